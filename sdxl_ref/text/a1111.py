r"""Prompts as AUTOMATIC1111's web UI reads them: weights, chunks of 75 tokens, BREAK.

| markup | weight of the text inside, w = 1 outside |
| --- | --- |
| `(text)` | 1.1 w |
| `[text]` | w / 1.1 |
| `(text:1.3)` | 1.3 w |
| `\(`, `\)`, `\[`, `\]`, `\\` | the character itself; another backslash vanishes |
| `# text` | a comment up to the end of its line, left out |

Neighbours of one weight are one text: `(un)(kind)` is the word "unkind". BREAK ends a chunk. A chunk that is full ends
behind its last comma, if that is one of its last 20 tokens, and else where it is full. With z (77,d) a tower's output
for a chunk, w (77,1) its tokens' weights, 1 for start, end and padding, and means over all numbers of the chunk:

    z' = w z · mean(z) / mean(w z)

All texts of a call get as many chunks as the longest, empty ones behind: the UI does so with several texts, and between
the two sides with its option "Pad prompt/negative prompt". (Without that option, its default, it runs sides of unlike
length apart.) The pooled vector is the first chunk's, without weights.

Refused, where the UI would do what nobody expects: an opening bracket that is never closed (it weighs all the rest),
BREAK in brackets (a word, and a negative weight), `(word:1.2.3)` (it fails), weights beyond 100; and its markup that
is not read here: `[from:to:0.5]`, `[one|another]`, AND, `<lora:…>`. A closing bracket alone is text, as there.

Source: modules/prompt_parser.py (`parse_prompt_attention`), modules/sd_hijack_clip.py (`tokenize_line`, `forward`),
modules/sd_emphasis.py (`EmphasisOriginal`, the default for SDXL too), modules/processing_scripts/comments.py, version
1.10.
"""

import re
from itertools import groupby

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.chunks import CHUNK_LENGTH, Chunk, Piece, check_depth, checked_weight, unbalanced, weighted
from sdxl_ref.text.inversion import Placeholders

ROUND = 1.1
SQUARE = 1 / 1.1
COMMA = 267  # the id of ",</w>"
BACKTRACK = 20  # tokens
MARK = re.compile(
    r"\\[()\[\]\\]?"
    r"|[(\[)]"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|(?P<when>:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\])"
    r"|\]"
    r"|[^\\()\[\]:]+"
    r"|:"
)
COMMENT = re.compile(r"#[^\n]*")
BREAK = re.compile(r"\bBREAK\b")
NOT_READ = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,300}>|\bAND\b")


def parse(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt between its BREAKs. InputError for what the module's docstring says is refused."""
    prompt = COMMENT.sub("", prompt)
    if match := NOT_READ.search(prompt):
        raise not_read(match[0])
    return [merged(part) for part in Parser(prompt).parts]


class Parser:
    """Reads a prompt from left to right. Positions are in characters; a bracket weighs all texts since it opened."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.parts: list[list[Piece]] = [[]]
        self.opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # position, and pieces before it
        for match in MARK.finditer(prompt):
            self.read(match)
        for mark, left in self.opened.items():
            if left:
                raise unbalanced(mark, prompt, left[0][0])

    def read(self, match: re.Match[str]) -> None:
        mark = match[0]
        if mark[0] == "\\":
            self.parts[-1].append(Piece(mark[1:], 1.0))
        elif mark in ("(", "["):
            self.opened[mark].append((match.start(), len(self.parts[-1])))
            check_depth(len(self.opened["("]) + len(self.opened["["]))
        elif match["weight"] and self.opened["("]:
            self.close("(", number(match["weight"], mark))
        elif mark == ")" and self.opened["("]:
            self.close("(", ROUND)
        elif mark == "]" and self.opened["["]:
            self.close("[", SQUARE)
        else:
            self.read_text(mark, is_editing=bool(match["when"]) and bool(self.opened["["]))

    def read_text(self, text: str, is_editing: bool) -> None:
        innermost = max(self.opened, key=lambda mark: self.opened[mark][-1:])
        if is_editing or ("|" in text and innermost == "[" and self.opened["["]):
            raise not_read(self.prompt[self.opened["["][-1][0] :][:60])
        first, *others = BREAK.split(text)
        if others and (self.opened["("] or self.opened["["]):
            raise InputError("BREAK inside brackets in a prompt: close them before it, and open them again behind it")
        self.parts[-1].append(Piece(first, 1.0))
        self.parts += [[Piece(other, 1.0)] for other in others]

    def close(self, mark: str, factor: float) -> None:
        _, start = self.opened[mark].pop()
        pieces = self.parts[-1]
        pieces[start:] = [Piece(text, checked_weight(weight * factor, text)) for text, weight in pieces[start:]]


def number(text: str, mark: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"expected a number as a weight in a prompt, found {mark[:60]!r}") from None


def not_read(markup: str) -> InputError:
    return InputError(
        f"{markup!r} in a prompt is not read by prompt_syntax='a1111': it knows weights and BREAK; leave it out, or "
        "write \\[ for a bracket that is text, and small letters for a word; adapters go on with load_lora_weights"
    )


def merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the same weight as one."""
    return [Piece("".join(text for text, _ in same), w) for w, same in groupby(pieces, lambda piece: piece.weight)]


class Wrapping:
    """Chunks as they fill, unit by unit: a token, or the vectors of an inversion, which stay together."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = [[]]
        self.comma = -1  # where the last chunk's last comma is

    def next_chunk(self, moved: Chunk) -> None:
        self.chunks.append(moved)
        self.comma = -1

    def add(self, unit: list[int], weight: float) -> None:
        chunk = self.chunks[-1]
        if unit == [COMMA]:
            self.comma = len(chunk)
        elif len(chunk) == CHUNK_LENGTH and self.comma >= 0 and len(chunk) - self.comma <= BACKTRACK:
            start = self.comma + 1
            self.next_chunk(chunk[start:])
            del chunk[start:]
        if len(self.chunks[-1]) + len(unit) > CHUNK_LENGTH:
            self.next_chunk([])
        self.chunks[-1] += weighted(unit, weight)


def read(prompt: str, placeholders: Placeholders) -> list[Chunk]:
    """The chunks of a prompt. InputError as `parse` raises it."""
    wrapping = Wrapping()
    for i, part in enumerate(parse(prompt)):
        if i > 0:
            wrapping.next_chunk([])
        for text, weight in part:
            for unit in placeholders.spell(text, whole_words=True):
                for item in [unit] if placeholders.stand_for_vectors(unit) else [[token] for token in unit]:
                    wrapping.add(item, weight)
    if len(wrapping.chunks) > 1 and not wrapping.chunks[-1]:
        wrapping.chunks.pop()  # BREAK at the end
    return wrapping.chunks


def weigh(z: Tensor, weights: Tensor) -> Tensor:
    """Towers' outputs (n,77,d) and weights (n,77) -> outputs, in at least float32 inside."""
    exact = z.to(torch.promote_types(z.dtype, torch.float32))
    changed = exact * weights.unsqueeze(2)
    mean = exact.mean(dim=(1, 2), keepdim=True)  # (n,1,1)
    restored = changed * (mean / changed.mean(dim=(1, 2), keepdim=True))
    is_weighted = (weights != 1).any(dim=1)[:, None, None]  # (n,1,1)
    return torch.where(is_weighted, restored.to(z.dtype), z)
