"""The web UI's prompt syntax: what a prompt is read as, how it falls into chunks, and how a weight acts."""

import random
import string

import peers
import pytest
import torch
from prompt_syntaxes import assert_quick, assert_refused, row
from torch import Tensor

from sdxl_ref.text import a1111
from sdxl_ref.text.inversion import Placeholders
from sdxl_ref.text.prompt_encoding import encode_prompts
from sdxl_ref.text.tokenizer import END, encode

UP = 1.1
DOWN = 1 / 1.1
EXACT = 1e-14  # float64, products in another order
PIECES = {  # prompt -> text and weight of each piece
    "": [("", 1)],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", UP), (" word", 1)],
    "((word))": [("word", UP**2)],
    "[word]": [("word", DOWN)],
    "[[word]]": [("word", DOWN**2)],
    "([word])": [("word", UP * DOWN)],
    "(word:1.3)": [("word", 1.3)],
    "(word: 1.3 )": [("word", 1.3)],
    "(word:.5)": [("word", 0.5)],
    "(word:-0.5)": [("word", -0.5)],
    "((word:1.3))": [("word", 1.3 * UP)],
    "(a (b:1.5):2)": [("a ", 2), ("b", 3)],
    "(:1.3)": [],
    "()": [],
    "(word:abc)": [("word:abc", UP)],
    "(word:)": [("word:", UP)],
    "(16:9)": [("16", 9)],
    "at 10:30, (wide)": [("at 10:30, ", 1), ("wide", UP)],
    "word:1.3)": [("word:1.3)", 1)],
    "a :) b]": [("a :) b]", 1)],
    r"\(a\) \[b\] \\": [(r"(a) [b] " + "\\", 1)],
    r"(a\):1.2)": [("a)", 1.2)],
    r"a\b": [("ab", 1)],
    "(un)(kind)": [("unkind", UP)],
    "(un)((kind))": [("un", UP), ("kind", UP**2)],
    "([a)b]": [("a", UP * DOWN), ("b", DOWN)],
    "a cat # (and\n(a dog)": [("a cat \n", 1), ("a dog", UP)],
    "# [a|b]": [],
    "{a|b} a|b": [("{a|b} a|b", 1)],
    "BREAKFAST (break)": [("BREAKFAST ", 1), ("break", UP)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))))": [
        *[("a ", 1), ("house", 1.3 * UP**2), (" ", UP), ("on", 1), (" a ", UP)],
        *[("hill", 0.5 * UP), (", sun, ", UP), ("sky", UP**4)],
    ],
}
REFUSED = {
    "(word": "'(' without its partner in a prompt, at '(word'",
    "a (b (c)": "'(' without its partner in a prompt, at '(b (c)'",
    "[word": "'[' without its partner",
    "[word:1.3)": "'[' without its partner",
    "(word:1.2.3)": "expected a number as a weight in a prompt, found ':1.2.3)'",
    "(word:.)": "expected a number as a weight",
    "(word:101)": "a weight must be within -100 and 100, found 101 for 'word'",
    f"(word:{'9' * 400})": "found inf for 'word'",
    "(" * 50 + "word" + ")" * 50: "a weight must be within",
    "(" * 10_000 + "word" + ")" * 10_000: "nest at most 100 deep",
    "(" * 10_000: "nest at most 100 deep",
    "(a BREAK b)": "BREAK inside brackets",
    "[cat:dog:0.5]": "'[cat:dog:0.5]' in a prompt is not read by prompt_syntax='a1111'",
    "a [dog: 10 ] b": "is not read",
    "[(a:1.2):3]": "is not read",
    "[cat|dog]": "is not read",
    "a cat AND a dog": "'AND' in a prompt is not read",
    "<lora:style:0.8> a cat": "'<lora:style:0.8>' in a prompt is not read",
}


@pytest.mark.parametrize(("prompt", "pieces"), PIECES.items())
def test_a_prompt_is_read_as_pieces(prompt: str, pieces: list[tuple[str, float]]) -> None:
    [part] = a1111.parse(prompt)
    assert [text for text, _ in part if text] == [text for text, _ in pieces if text]
    weights = [weight for text, weight in part if text]
    assert weights == pytest.approx([weight for text, weight in pieces if text], rel=EXACT)


@pytest.mark.parametrize(("prompt", "message"), REFUSED.items(), ids=lambda text: text[:30])
def test_a_surprise_is_refused_in_one_line(prompt: str, message: str) -> None:
    assert_refused(lambda: a1111.parse(prompt), message)


@pytest.mark.parametrize("seed", range(3))
def test_text_without_markup_is_read_as_it_stands(seed: int) -> None:
    rng = random.Random(seed)
    letters = string.ascii_letters + string.digits + " ,.;:!?{}<>|'\"-\n\t\u00e9\u0436\u65e5\U0001f600"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randint(0, 60)))
        assert "".join(piece for [part] in [a1111.parse(text)] for piece, _ in part) == text
        assert {weight for [part] in [a1111.parse(text)] for _, weight in part} <= {1.0}


@pytest.mark.parametrize("seed", range(3))
def test_escaped_text_is_read_as_it_stands(seed: int) -> None:
    """Inside a weight too, which it all has then."""
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("ab ()[]\\,", k=rng.randint(1, 40))) + "c"
        escaped = "".join("\\" + letter if letter in "()[]\\" else letter for letter in text)
        assert a1111.parse(escaped) == [[(text, 1.0)]]
        assert a1111.parse(f"({escaped}:1.5)") == [[(text, 1.5)]]


# --- chunks -------------------------------------------------------------------------------------------------------


def lengths(prompt: str) -> list[int]:
    return [len(chunk) for chunk in a1111.read(prompt, Placeholders())]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 200, [75, 75, 50]),
        ("cat " * 55 + "," + " dog" * 19, [75]),
        ("cat " * 55 + "," + " dog" * 20, [56, 20]),  # the comma is the 20th token from the end
        ("cat " * 54 + "," + " dog" * 21, [75, 1]),  # the 21st
        ("cat " * 74 + "," + " dog", [75, 1]),
        ("cat " * 75 + "," + " dog", [75, 2]),
        ("a BREAK b c", [1, 2]),
        ("a\nBREAK\nb", [1, 1]),
        ("a BREAK BREAK b", [1, 0, 1]),
        ("BREAK a", [0, 1]),
        ("a BREAK", [1]),
        ("BREAK", [0]),
        ("cat " * 80 + "BREAK dog", [75, 5, 1]),
    ],
)
def test_a_prompt_falls_into_chunks(prompt: str, expected: list[int]) -> None:
    assert lengths(prompt) == expected


# --- weights ------------------------------------------------------------------------------------------------------


def by_hand(z: Tensor, weights: list[float]) -> Tensor:
    """The formula of the module's docstring, for one chunk (1,77,d)."""
    w = torch.tensor([1.0, *weights, 1.0, *[1.0] * (75 - len(weights))])[None, :, None]
    return w * z * z.mean() / (w * z).mean()


def test_weights_multiply_the_tokens_and_keep_the_chunks_mean() -> None:
    """Of each tower and each chunk for itself; the pooled vector is the first chunk's, as it was."""
    clip_l = peers.small_clip()
    openclip = peers.small_openclip()
    prompt = "a (red cat:1.3), [dog] BREAK bird BREAK ((sun:-0.5))"
    context, pooled = encode_prompts(clip_l, openclip, [prompt], [prompt], "cpu", syntax="a1111")
    chunks = [(encode("a red cat, dog"), [1, 1.3, 1.3, 1, DOWN]), (encode("bird"), [1.0]), (encode("sun"), [-0.55])]
    contexts = []
    for ids, weights in chunks:
        z_l = by_hand(clip_l(row(ids, END)), weights)
        z_g = by_hand(openclip(row(ids, 0))[0], weights)
        contexts.append(torch.cat([z_l, z_g], dim=2))
    assert peers.distance(context, torch.cat(contexts, dim=1)) < 1e-6
    assert peers.distance(pooled, openclip(row(chunks[0][0], 0))[1]) < 1e-6


def test_shorter_prompts_get_empty_chunks() -> None:
    openclip = peers.small_openclip()
    prompts = ["cat " * 100, "dog"]
    context, pooled = encode_prompts(None, openclip, prompts, prompts, "cpu", syntax="a1111")
    assert context.shape == (2, 154, 64)
    hidden, their_pooled = openclip(torch.cat([row(encode("dog"), 0), row([], 0)]))
    assert peers.distance(context[1], hidden.flatten(0, 1)) < 1e-6
    assert peers.distance(pooled[1], their_pooled[0]) < 1e-6


def test_bfloat16_is_weighed_in_float32() -> None:
    z = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    weights = torch.ones(1, 77)
    weights[0, 5] = 1.3
    rounded = z.bfloat16()
    weighed = a1111.weigh(rounded, weights)
    assert weighed.dtype == torch.bfloat16
    assert torch.equal(weighed, a1111.weigh(rounded.float(), weights).bfloat16())


@pytest.mark.parametrize(
    "prompt",
    [
        *("(" * 10_000, ")" * 10_000, "[" * 10_000, ":" * 10_000, "\\" * 10_001, "(a" * 10_000),
        *(" " * 10_000, "(a:" + "1" * 20_000, "(a:1" + " " * 10_000, "BREAK " * 1_000, "[a|" * 5_000),
        *("(a)" * 3_000, "\U0001f600" * 5_000, "cat dog, " * 2_500, "<lora:" * 2_000, "|" * 10_000),
    ],
    ids=lambda prompt: f"{prompt[:6]} {len(prompt)}",
)
def test_hostile_prompts_take_no_time(prompt: str) -> None:
    assert_quick(a1111.read, prompt)
