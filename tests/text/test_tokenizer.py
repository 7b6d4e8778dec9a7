"""Token ids against open_clip's own function and against transformers' CLIP tokenizer, on seeded fuzzed prompts, on
every token of the vocabulary and on long words."""

from __future__ import annotations

import html
import importlib.util
import random
import string
import time
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from peers import clip_tokenizer

from sdxl_ref.text.tokenizer import BYTES, END, LETTERS, START, decode, encode, merges, tokenize

SCRIPTS = {  # first and last code point
    "ascii": (0x20, 0x7E),
    "latin-1": (0xA1, 0xFF),
    "latin extended": (0x100, 0x24F),
    "combining": (0x300, 0x36F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x58F),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE00, 0xE5B),
    "georgian": (0x10A0, 0x10FF),
    "ethiopic": (0x1200, 0x137C),
    "punctuation": (0x2010, 0x205E),
    "symbols": (0x2100, 0x23FF),
    "dingbats": (0x2700, 0x27BF),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private use": (0xE000, 0xE0FF),
    "ligatures": (0xFB00, 0xFB06),
    "full width": (0xFF01, 0xFFEE),
    "mathematical": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "tags": (0xE0020, 0xE007F),
    "control": (0x00, 0x1F),
    "control 2": (0x7F, 0x9F),
}
TEXT = (
    "a the photo of an astronaut riding horse watercolour painting, highly-detailed 8k 35mm f/1.8 it's they're I'll "
    "we'd cat's cats' O'Reilly NASA iPhone naïve café Straße İstanbul ΣΊΣΥΦΟΣ Москва "
    "北京 東京タワー 서울 नमस्ते مرحبا שלום"
)
PIECES = [
    *("!", "!!!", " ! ", "?!", "...", "(((masterpiece)))", "[a|b]", "{x}", "<lora:x:0.8>", "AND", "BREAK", "--", "_"),
    *("&amp;", "&lt;b&gt;", "&amp;amp;lt;", "&#33;", "&#x1F600;", "&nbsp;", "&unknown;", "&copy", "<b>bold</b>"),
    *("<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "<|endoftext|>", "<|startoftext|>", "</w>", "Ġ"),
    *("👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "❤️", "1️⃣", "é", "e\u0301", "ﬁ", "“quoted”", "‘it’s’", "…", "½", "x²", "Ⅷ", "①"),
    *("\u00a0", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\ufffd", "\x00", "\x1b[31m", "\r\n", "\t", "\x85"),
    *("Ã©", "â€™", "schÃ¶n", "ðŸ˜Š", "\ud800", "12345678901234567890", "a" * 200, "ab" * 60, "日本" * 30),
]


def fuzzed(count: int, seed: int = 0) -> list[str]:
    """Prompts out of words, awkward pieces and random characters of one or of many scripts, short and over-long."""
    rng = random.Random(seed)
    edges = ["", " ", "\n\t ", "!", "!" * 100, "&", "a" * 1000, "\x00", "\ufeff"]
    edges += [" ".join(["cat"] * n) for n in (74, 75, 76, 77, 200)]  # around the cut, which is after 75 ids

    def script(name: str) -> str:
        low, high = SCRIPTS[name]
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))

    def anything() -> str:
        code = rng.randrange(0x110000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"

    def part() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(TEXT.split())
        if kind < 0.65:
            return rng.choice(PIECES)
        return script(rng.choice(list(SCRIPTS))) if kind < 0.95 else anything()

    prompts = edges + [script(name) for name in SCRIPTS for _ in range(8)] + PIECES
    while len(prompts) < count:
        length = rng.choice([1, 2, 4, 8, 16, 60])
        prompts.append(rng.choice(["", " ", "  "]).join(part() for _ in range(length)))
    return prompts


PROMPTS = fuzzed(2500)


@pytest.fixture(scope="module")
def open_clip_ids() -> torch.Tensor:
    import open_clip

    return open_clip.tokenize(PROMPTS)


@pytest.fixture(scope="module")
def peer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


def quiet(texts: list[str] | str, pad: str = "zero") -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(texts, pad)


def differing(a: torch.Tensor, b: torch.Tensor, prompts: list[str]) -> list[str]:
    return [prompt for prompt, x, y in zip(prompts, a, b, strict=True) if not torch.equal(x, y)]


def lengths(ids: torch.Tensor) -> torch.Tensor:
    """Up to and including the last end-of-text id of rows padded with zero; a prompt may spell one out before."""
    return 77 - ids.flip(1).eq(END).int().argmax(1)


def test_the_corpus_is_what_it_claims(open_clip_ids: torch.Tensor) -> None:
    text = "".join(PROMPTS)
    assert len(set(PROMPTS)) > 2000
    assert all(any(low <= ord(c) <= high for c in text) for low, high in SCRIPTS.values())
    assert sum("!" in prompt for prompt in PROMPTS) > 200
    assert (lengths(open_clip_ids) == 77).sum() > 200  # cut, or just full
    assert (lengths(open_clip_ids) == 2).sum() >= 5  # empty


def test_ids_are_open_clips(open_clip_ids: torch.Tensor) -> None:
    ids = quiet(PROMPTS)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(PROMPTS), 77)
    assert differing(ids, open_clip_ids, PROMPTS) == []


def test_pad_eos_is_the_same_ids_with_the_padding_replaced(open_clip_ids: torch.Tensor) -> None:
    expected = open_clip_ids.clone()
    for row, length in zip(expected, lengths(open_clip_ids).tolist(), strict=True):
        row[length:] = END
    assert differing(quiet(PROMPTS, "eos"), expected, PROMPTS) == []


def comparable(text: str) -> bool:
    """Prompts for which the two libraries mean to do the same. transformers leaves out open_clip's cleaning (ftfy and
    html entities); it spells the special tokens otherwise and lets prompts use them; it reads "!" as its padding where
    that is the pad token; it lowers letters one by one, so that it has no final sigma; U+0345, a mark whose case folds
    to a letter, is a letter to one only; and code points that Python's Unicode version does not know may be letters in
    another version."""
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    special = any(word in text.lower() for word in ("<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoft"))
    unassigned = any(unicodedata.category(c) == "Cn" for c in text)
    return cleaned == text and not special and not unassigned and not set("!Σ\u0345") & set(text)


@pytest.fixture(scope="module")
def comparable_prompts() -> list[str]:
    return [prompt for prompt in PROMPTS if comparable(prompt)]


@pytest.mark.parametrize(("pad", "token"), [("zero", "!"), ("eos", "<|endoftext|>")])
def test_ids_are_those_of_transformers(pad: str, token: str, comparable_prompts: list[str], tmp_path: Path) -> None:
    prompts = comparable_prompts
    assert len(prompts) > 500
    peer = clip_tokenizer(tmp_path, token)
    theirs = peer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert differing(quiet(prompts, pad), theirs, prompts) == []


def test_an_exclamation_mark_is_no_padding(tmp_path: Path) -> None:
    """The known trap: with "!" as pad token, transformers turns the mark itself into the padding id 0."""
    assert quiet("wow!")[0, 1:4].tolist() == [2781, 256, END]
    assert quiet("!")[0, :3].tolist() == [START, 256, END]
    assert clip_tokenizer(tmp_path, "!")("wow!").input_ids == [START, 2781, 0, END]


def test_a_long_prompt_warns_with_the_part_that_was_cut() -> None:
    kept = " ".join(["cat"] * 75)
    with pytest.warns(UserWarning, match="longer than 77 tokens; cut: 'purple dog , running'") as record:
        ids = tokenize([f"{kept} purple dog, running", "a cat"])
    assert len(record) == 1
    assert ids[0, -1] == END
    assert torch.equal(ids[0], quiet(kept)[0])


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="longer") as record:
        tokenize("cat " * 76)
    assert record[0].filename == __file__


def test_a_prompt_that_just_fits_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(" ".join(["cat"] * 75))
    assert (ids == 2368).sum() == 75
    assert ids[0, [0, -1]].tolist() == [START, END]


@pytest.mark.parametrize("pad", ["", "Zero", "0", 0, None])
def test_an_unknown_padding_is_an_error(pad: object) -> None:
    with pytest.raises(ValueError, match="expected pad"):
        tokenize("a cat", pad)  # type: ignore[arg-type]


def test_one_prompt_or_several() -> None:
    assert tokenize("a cat").shape == (1, 77)
    assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))
    assert torch.equal(tokenize(("a cat", "a dog")), torch.cat([tokenize("a cat"), tokenize("a dog")]))
    assert tokenize([]).shape == (0, 77)


def test_the_vocabulary_is_open_clips(peer: Any) -> None:
    assert list(merges()) == list(peer.bpe_ranks)
    assert list(zip(BYTES, LETTERS, strict=True)) == list(peer.byte_encoder.items())


def test_each_token_is_made_by_one_pair_and_learned_after_its_parts() -> None:
    """What the order of the heap rests on."""
    known = {*LETTERS, *(letter + "</w>" for letter in LETTERS)}
    for left, right in merges():
        assert {left, right} <= known
        assert left + right not in known
        known.add(left + right)


def test_every_token_is_decoded_and_encoded_as_by_open_clip(peer: Any) -> None:
    texts = {i: decode([i]) for i in range(END + 1)}
    assert [i for i, text in texts.items() if text != peer.decode([i])] == []
    encoded = {i: encode(text) for i, text in texts.items()}
    assert [i for i, text in texts.items() if encoded[i] != peer.encode(text)] == []
    assert sum(ids == [i] for i, ids in encoded.items()) > 30_000  # the others are parts of words or of characters


def test_decoding_is_open_clips(peer: Any) -> None:
    """Of random ids too, which spell out broken UTF-8 and ends of words in any place."""
    rng = random.Random(0)
    rows = [[rng.randint(0, END) for _ in range(rng.randint(0, 30))] for _ in range(1000)]
    rows += [encode(prompt) for prompt in PROMPTS[:1000]]
    assert [ids for ids in rows if decode(ids) != peer.decode(ids)] == []
    assert decode([320, 2368, END]) == "a cat <end_of_text>"
    assert decode([255]) == "\ufffd"


@pytest.mark.parametrize("i", [-1, END + 1])
def test_an_unknown_id_is_an_error(i: int) -> None:
    with pytest.raises(KeyError, match=str(i)):
        decode([320, i])


AWKWARD = [
    *("<start_of_text>", "<END_OF_TEXT>", "a<end_of_text>b", "<end_of_text><end_of_text>", "<\u017ftart_of_text>"),
    *("'s 't 're 've 'm 'll 'd", "it's we'RE 'LL'D", "'\u017f it'\u017f", "' s", "'sd", "''s", "\u0345", "e\u0345"),
    *("&amp;lt;b&amp;gt;", "&amp;amp;amp;", "&#xD800;", "\ud800", "\ud83d\ude00", "a\u00a0\u3000\x1cb", "\u0130\u03a3"),
]


def test_specials_contractions_and_cleaning(peer: Any) -> None:
    assert [text for text in AWKWARD if encode(text) != peer.encode(text)] == []
    assert encode("a <End_of_text>") == [320, END]


def long_words() -> list[str]:
    """Random words out of few letters, where pairs repeat and overlap, and of many; repeated letters and syllables."""
    rng = random.Random(0)
    alphabets = ["ab", "aeinst", string.ascii_lowercase, "!?.", "\u0430\u043d\u0442", "\u65e5\u672c\u4eac"]
    words = ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))) for _ in range(300)]
    return words + [unit * count for unit in ("a", "h", "!", "ha", "\u00e9") for count in range(1, 41)]


def test_long_words_are_joined_as_by_open_clip(peer: Any) -> None:
    assert [word for word in long_words() if encode(word) != peer.encode(word)] == []


@pytest.mark.parametrize("alphabet", [string.ascii_lowercase, "a"])
def test_a_word_of_20000_letters_takes_less_than_a_second(alphabet: str) -> None:
    word = "".join(random.Random(0).choices(alphabet, k=20_000))

    def seconds() -> float:
        start = time.perf_counter()
        ids = encode(word)
        took = time.perf_counter() - start
        assert decode(ids) == word + " "
        return took

    encode("a")  # reads the vocabulary
    assert min(seconds(), seconds()) < 1


def test_a_missing_open_clip_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        merges.__wrapped__()  # past the cache
