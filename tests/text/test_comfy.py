"""ComfyUI's prompt syntax: what a prompt is read as, how it falls into chunks, and how a weight acts."""

import random
import string

import peers
import pytest
import torch
from prompt_syntaxes import assert_quick, assert_refused, row
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text import comfy
from sdxl_ref.text.inversion import Inversions, Placeholders
from sdxl_ref.text.prompt_encoding import encode_prompts
from sdxl_ref.text.tokenizer import END, encode

UP = 1.1
EXACT = 1e-14  # float64, products in another order
PIECES = {  # prompt -> text and weight of each piece
    "": [],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", UP), (" word", 1)],
    "((word))": [("word", UP**2)],
    "(word:1.3)": [("word", 1.3)],
    "(word: 1.3 )": [("word", 1.3)],
    "(word:.5)": [("word", 0.5)],
    "(word:-0.5)": [("word", -0.5)],
    "(word:1e1)": [("word", 10)],
    "((word:1.3))": [("word", 1.3)],  # a stated weight is the weight
    "(a (b:1.5):2)": [("a ", 2), ("b", 1.5)],
    "(a (b):2)": [("a ", 2), ("b", 2 * UP)],
    "((a):2)": [("a", 2 * UP)],
    "(a:2 (b))": [("a:2 ", UP), ("b", UP**2)],
    "(:1.3)": [(":1.3", UP)],
    "()": [],
    "(word:abc)": [("word:abc", UP)],
    "(word:1.2.3)": [("word:1.2.3", UP)],
    "(word:)": [("word:", UP)],
    "(16:9)": [("16", 9)],
    "(a:1, b:2)": [("a:1, b", 2)],
    "word:1.3": [("word:1.3", 1)],
    "[word] [[word:1.3]]": [("[word] [[word:1.3]]", 1)],
    r"\(a\) \[b\] \\": [(r"(a) \[b\] \\", 1)],
    r"(a\):1.2)": [("a)", 1.2)],
    r"(a:\(1.2)": [("a:(1.2", UP)],
    "(un)(kind)": [("un", UP), ("kind", UP)],
    "a BREAK b AND c": [("a BREAK b AND c", 1)],
}
REFUSED = {
    "(word": "'(' without its partner in a prompt, at '(word'",
    "((a:1.2)": "'(' without its partner in a prompt, at '((a:1.2)'",
    "a :) (b)": "')' without its partner in a prompt, at ') (b)': close it, or write \\)",
    "(word:101)": "a weight must be within -100 and 100, found 101 for 'word'",
    "(word:nan)": "found nan for 'word'",
    "(word:inf)": "found inf for 'word'",
    "(" * 50 + "word" + ")" * 50: "a weight must be within",
    "(" * 10_000 + "word" + ")" * 10_000: "nest at most 100 deep",
    "(" * 10_000: "nest at most 100 deep",
    "a {cat|dog}": "'{cat|dog}' in a prompt: ComfyUI's page draws choices",
    "a cat // a dog": "'//' in a prompt: ComfyUI's page draws choices and takes comments out",
    "a /* cat */ dog": "'/*' in a prompt",
    "embedding:foo": "no embedding 'foo' is loaded",
    "a,embedding:foo": "expected a space in front of 'embedding:'",
}


@pytest.mark.parametrize(("prompt", "pieces"), PIECES.items())
def test_a_prompt_is_read_as_pieces(prompt: str, pieces: list[tuple[str, float]]) -> None:
    read = comfy.parse(prompt)
    assert [text for text, _ in read] == [text for text, _ in pieces]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in pieces], rel=EXACT)


@pytest.mark.parametrize(("prompt", "message"), REFUSED.items(), ids=lambda text: text[:30])
def test_a_surprise_is_refused_in_one_line(prompt: str, message: str) -> None:
    assert_refused(lambda: comfy.read(prompt, Placeholders()), message)


@pytest.mark.parametrize("seed", range(3))
def test_text_without_markup_is_read_as_it_stands(seed: int) -> None:
    rng = random.Random(seed)
    letters = string.ascii_letters + string.digits + " ,.;:!?[]{}<>'\"#-\\\n\t\u00e9\u0436\u65e5\U0001f600"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randint(1, 60)))
        assert comfy.parse(text) == [(text, 1.0)]


@pytest.mark.parametrize("seed", range(3))
def test_escaped_parentheses_are_text(seed: int) -> None:
    """Inside a weight too, which they have then."""
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("ab (),", k=rng.randint(1, 40))) + "c"
        escaped = text.replace("(", "\\(").replace(")", "\\)")
        assert comfy.parse(escaped) == [(text, 1.0)]
        assert comfy.parse(f"({escaped}:1.5)") == [(text, 1.5)]


# --- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 200, [75, 75, 50]),
        ("cat " * 70 + "(dog dog dog dog dog)", [75]),
        ("cat " * 70 + "(dog dog dog dog dog dog)", [70, 6]),
        ("cat " * 70 + "(dog dog dog dog dog dog dog)", [70, 7]),
        ("cat " * 70 + "(dog dog dog dog dog dog dog dog)", [75, 3]),  # 8 tokens are cut
        ("cat " * 75 + "(dog dog dog dog dog dog dog dog)", [75, 8]),
        ("cat " * 70 + "(dog)" + " bird" * 8, [75, 4]),
    ],
)
def test_a_prompt_falls_into_chunks(prompt: str, expected: list[int]) -> None:
    assert [len(chunk) for chunk in comfy.read(prompt, Placeholders())] == expected


# --- weights ------------------------------------------------------------------------------------------------------


def by_hand(z: Tensor, empty: Tensor, weights: list[float]) -> Tensor:
    """The formula of the module's docstring, for one chunk (1,77,d)."""
    w = torch.tensor([1.0, *weights, 1.0, *[1.0] * (75 - len(weights))])[None, :, None]
    return empty + w * (z - empty)


def test_weights_lead_from_the_empty_prompt_to_the_words_and_beyond() -> None:
    """Of each tower for itself; the pooled vector is the first chunk's, as it was."""
    clip_l = peers.small_clip()
    openclip = peers.small_openclip()
    prompt = "a (red cat:1.3), dog" + " tree" * 70 + " (sun:-0.5)"
    context, pooled = encode_prompts(clip_l, openclip, [prompt], [prompt], "cpu", syntax="comfy")
    chunks = [(encode("a red cat, dog" + " tree" * 70), [1, 1.3, 1.3, *[1] * 72]), (encode("sun"), [-0.5])]
    contexts = []
    for ids, weights in chunks:
        z_l = by_hand(clip_l(row(ids, END)), clip_l(row([], END)), weights)
        z_g = by_hand(openclip(row(ids, 0))[0], openclip(row([], 0))[0], weights)
        contexts.append(torch.cat([z_l, z_g], dim=2))
    assert peers.distance(context, torch.cat(contexts, dim=1)) < 1e-6
    assert peers.distance(pooled, openclip(row(chunks[0][0], 0))[1]) < 1e-6


def test_shorter_prompts_are_repeated_which_the_unet_does_not_see() -> None:
    openclip = peers.small_openclip().double()
    prompts = ["cat " * 100, "dog"]
    context, pooled = encode_prompts(None, openclip, prompts, prompts, "cpu", syntax="comfy")
    alone, alone_pooled = encode_prompts(None, openclip, ["dog"], ["dog"], "cpu", syntax="comfy")
    assert context.shape == (2, 154, 64)
    assert peers.distance(context[1:], alone.repeat(1, 2, 1)) < 1e-14
    unet = peers.small_unet(peers.TINY_REFINER.unet).double()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.cat([pooled[1:], torch.zeros(1, 5 * 256, dtype=torch.float64)], dim=1)
    t = torch.tensor([100])
    assert peers.distance(unet(x, t, context[1:], y), unet(x, t, alone, y)) < 1e-12
    assert peers.distance(alone_pooled, pooled[1:]) < 1e-14


def test_too_many_repetitions_are_an_error() -> None:
    prompts = ["cat " * (75 * 17 - 1), "cat " * (75 * 16 - 1)]
    with pytest.raises(InputError, match="prompts of 16, 17 chunks of 75 tokens in one call want 272: at most 256"):
        encode_prompts(None, peers.small_openclip(), prompts, prompts, "cpu", syntax="comfy")


# --- embeddings ---------------------------------------------------------------------------------------------------


def with_embedding(vectors: int = 3) -> Placeholders:
    inversions = Inversions(peers.SMALL_REFINER.text_encoders)
    inversions.add("Easy-negative", {"clip_g": torch.zeros(vectors, 64)})
    return inversions.placeholders("clip_g")


@pytest.mark.parametrize(
    ("prompt", "before", "behind", "weight"),
    [
        ("embedding:easy-negative", "", "", 1),
        ("a cat, embedding:Easy-negative, a dog", "a cat,", ", a dog", 1),
        ("a\nembedding:easy-negative.safetensors dog", "a", "dog", 1),
        ("a (embedding:easy-negative:1.2) dog", "a", "dog", 1.2),
    ],
)
def test_an_embedding_stands_for_its_vectors(prompt: str, before: str, behind: str, weight: float) -> None:
    placeholders = with_embedding()
    [chunk] = comfy.read(prompt, placeholders)
    vectors = placeholders.of_name("easy-negative")
    assert [token.id for token in chunk] == [*encode(before), *vectors, *encode(behind)]
    assert {token.weight for token in chunk if token.id in vectors} == {weight}


def test_the_name_alone_is_words() -> None:
    [chunk] = comfy.read("easy-negative", with_embedding())
    assert [token.id for token in chunk] == encode("easy-negative")


def test_a_few_vectors_stay_together() -> None:
    assert [len(chunk) for chunk in comfy.read("cat " * 73 + "embedding:easy-negative", with_embedding())] == [73, 3]
    assert [len(chunk) for chunk in comfy.read("cat " * 73 + "embedding:easy-negative", with_embedding(9))] == [75, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        *("(" * 10_000, ")" * 10_000, ":" * 10_000, "\\" * 10_001, "(a" * 10_000, "(a:" + "1" * 20_000 + ")"),
        *(" " * 10_000, "(a:1" + " " * 10_000 + ")", "{a|" * 10_000, "embedding:" * 10_000, "(a)" * 3_000),
        *("\U0001f600" * 5_000, "cat dog, " * 2_500, "(" * 90 + "a" + ":1)" * 90, "a\\(" * 10_000),
    ],
    ids=lambda prompt: f"{prompt[:6]} {len(prompt)}",
)
def test_hostile_prompts_take_no_time(prompt: str) -> None:
    assert_quick(comfy.read, prompt)
