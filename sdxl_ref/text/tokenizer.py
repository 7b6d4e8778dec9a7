"""Byte-pair encoding on one page: text -> the ids that both of SDXL's text towers were trained with.

A prompt is cleaned and cut into words; a word is spelled with one symbol for each of its UTF-8 bytes; then neighbours
are joined, pair by pair, in the order in which training learned the pairs. Sources: Sennrich et al. 2016,
arXiv:1508.07909 (the pairs); Radford et al. 2019, GPT-2 (the bytes); open_clip's `SimpleTokenizer`, whose ids these
are. Its vocabulary file is read out of the installed package, which is not imported: that would take seconds.
"""

import gzip
import html
import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from heapq import heappop, heappush
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

CONTEXT_LENGTH = 77
START, END = 49406, 49407
SPECIAL = ("<start_of_text>", "<end_of_text>")  # the tokens of these two ids; a prompt may spell them out
MERGES = 48_894  # so many of the file's 262,144 pairs are CLIP's
END_OF_WORD = "</w>"  # belongs to a word's last symbol
WORD = regex.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.I)
VISIBLE = bytes([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])  # characters of Latin-1
BYTES = VISIBLE + bytes(sorted(set(range(256)) - set(VISIBLE)))  # in the order of their ids
# GPT-2's map: a printable letter for each of BYTES, itself where it is visible, else a character from 256 on.
LETTERS = VISIBLE.decode("latin-1") + "".join(map(chr, range(256, 512 - len(VISIBLE))))


@cache
def merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 pairs of symbols, in the order learned. ImportError where open_clip_torch is not installed."""
    package = importlib.util.find_spec("open_clip")  # finds, does not import
    if package is None or package.origin is None:
        raise ImportError("open_clip_torch is not installed: pip install open_clip_torch")
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : MERGES + 1]  # after a title
    return tuple((left, right) for left, right in map(str.split, lines))


@cache
def tokens() -> dict[int, str]:
    """The 49,408 tokens: the bytes' letters, the same at the end of a word, the joined pairs, the special ones."""
    return dict(enumerate([*LETTERS, *(letter + END_OF_WORD for letter in LETTERS), *map("".join, merges()), *SPECIAL]))


@cache
def _joined() -> dict[tuple[int, int], int]:
    """The ids of two neighbours -> the id of the token that they make."""
    ids = {token: i for i, token in tokens().items()}
    return {(ids[left], ids[right]): ids[left + right] for left, right in merges()}


def encode(text: str) -> list[int]:
    """Text -> ids, as many as there are, without start and end: what open_clip's `SimpleTokenizer.encode` gives."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))  # an entity may be escaped twice
    words = WORD.findall(" ".join(mended.split()).lower())
    return [i for word in words for i in _encode_word(word)]


def decode(ids: Iterable[int]) -> str:
    """Ids -> text with a space after each word, U+FFFD for bytes that are no UTF-8. KeyError on an unknown id."""
    letters = "".join(tokens()[i] for i in ids)
    return bytes(BYTES[LETTERS.index(letter)] for letter in letters).decode(errors="replace").replace(END_OF_WORD, " ")


def _encode_word(word: str) -> list[int]:
    if word in SPECIAL:
        return [START + SPECIAL.index(word)]
    symbols = [BYTES.index(byte) for byte in word.encode()]
    symbols[-1] += len(BYTES)  # the same letter at the end of a word
    return _join(symbols, _joined())


def _join(symbols: Sequence[int], joined: Mapping[tuple[int, int], int]) -> list[int]:
    """Joins neighbours until no two of them make a token, in O(n log n) for n symbols.

    By definition, each round joins all occurrences of the earliest learned pair, from left to right. A heap that gives
    the lowest (id of the joined token, position) first does the same. Ids stand in the order of learning, each token
    is made by exactly one pair, and a pair is learned after its two parts: so a pair that contains the symbol just
    joined makes a higher id, and waits until the round is over. Where two occurrences overlap ("aaa"), joining the
    left one makes the right one stale: its position no longer makes the token it was pushed for, and it is skipped.
    """
    ring = [*symbols, -1]  # a linked list, closed to a ring; -1 is no symbol
    before = [len(symbols), *range(len(symbols))]
    after = [*range(1, len(ring)), 0]
    heap: list[tuple[int, int]] = []

    def push(position: int) -> None:
        pair = (ring[position], ring[after[position]])
        if pair in joined:
            heappush(heap, (joined[pair], position))

    for position in range(len(symbols)):
        push(position)
    while heap:
        token, position = heappop(heap)
        right = after[position]
        if joined.get((ring[position], ring[right])) != token:
            continue  # stale
        ring[position] = token
        ring[right] = -1
        after[position] = after[right]
        before[after[right]] = position
        push(before[position])
        push(position)
    return [symbol for symbol in ring if symbol >= 0]


def tokenize(texts: str | Sequence[str], pad: str = "zero") -> Tensor:
    """Prompts -> ids (n,77) int64: start, text, end, padding.

    pad: "zero" (OpenCLIP's towers) or "eos" (CLIP-L: the end-of-text id again). A longer text is cut to 75 ids, with
    end-of-text last, and a warning shows what was cut. ValueError for another `pad`.
    """
    if pad not in ("zero", "eos"):
        raise ValueError(f'expected pad "zero" or "eos", found {pad!r}')
    prompts = [texts] if isinstance(texts, str) else texts
    rows = torch.full((len(prompts), CONTEXT_LENGTH), 0 if pad == "zero" else END, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = encode(prompt)
        if rest := ids[CONTEXT_LENGTH - 2 :]:
            cut = decode(rest).strip()
            warnings.warn(f"the prompt is longer than {CONTEXT_LENGTH} tokens; cut: {cut!r}", stacklevel=2)
        row[: len(ids) + 2] = torch.tensor([START, *ids[: CONTEXT_LENGTH - 2], END])
    return rows
