"""Prompts in all syntaxes: what these share; long ones against transformers' towers, clip_skip against diffusers."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pairs
import peers
import pytest
import torch
from cases import sample
from checks import FLOAT32
from torch import Tensor

from sdxl_ref import TextToImagePipeline, pack
from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import why_not
from sdxl_ref.text.conditioning import encode_text
from sdxl_ref.text.inversion import Inversions, Placeholders
from sdxl_ref.text.prompt_encoding import SYNTAXES, encode_prompts
from sdxl_ref.text.tokenizer import END, START, encode
from sdxl_ref.weights.offload import Offload

PROMPTS = ["a cup of coffee, morning light", "", "it's 2017: a/b <3 \U0001f600 &amp; caf\u00e9\n\tx", "cat " * 75]


def towers(kind: str) -> tuple[Any, Any]:
    networks = pairs.networks(kind)
    return networks.get("text_encoder"), networks["text_encoder_2"]


@pytest.mark.parametrize("kind", ["base", "refiner"])
@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_short_prompts_without_markup_are_the_plain_ones_to_the_bit(syntax: str, kind: str) -> None:
    usual = encode_text(*towers(kind), PROMPTS, PROMPTS[::-1], "cpu")
    ours = encode_prompts(*towers(kind), PROMPTS, PROMPTS[::-1], "cpu", syntax=syntax)
    assert all(map(torch.equal, usual, ours))


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_no_token_and_no_weight_is_lost_between_chunks(syntax: str) -> None:
    chunks = SYNTAXES[syntax].read("a tall tree, (red:1.2) leaves, " * 30, Placeholders())
    assert len(chunks) > 2
    tokens = [token for chunk in chunks for token in chunk]
    assert [token.id for token in tokens] == encode("a tall tree, red leaves, " * 30)
    assert {token.id for token in tokens if token.weight != 1} == set(encode("red"))


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_a_weight_in_one_prompt_leaves_the_others_to_the_bit(syntax: str) -> None:
    openclip = peers.small_openclip()
    prompts = ["a cat", "a (dog:1.3)"]
    weighted, _ = encode_prompts(None, openclip, prompts, prompts, "cpu", syntax=syntax)
    plain, _ = encode_prompts(None, openclip, ["a cat", "a dog"], ["a cat", "a dog"], "cpu")
    assert torch.equal(weighted[0], plain[0])
    assert not torch.equal(weighted[1], plain[1])


def test_plain_knows_no_markup_and_cuts_with_a_warning() -> None:
    prompts = ["a (cat:1.3) BREAK [dog]" + " tree" * 80]
    with pytest.warns(UserWarning, match=r"longer than 77 tokens; cut: 'tree tree"):
        usual = encode_text(*towers("base"), prompts, prompts, "cpu")
    with pytest.warns(UserWarning, match=r"longer than 77 tokens; cut: 'tree tree"):
        ours = encode_prompts(*towers("base"), prompts, prompts, "cpu")
    assert all(map(torch.equal, usual, ours))


def test_an_unknown_syntax_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown prompt_syntax 'a111': did you mean 'a1111'"):
        encode_prompts(*towers("base"), ["a"], ["a"], "cpu", syntax="a111")


# --- long prompts -------------------------------------------------------------------------------------------------


def long_prompt_recipe(ids: list[int], pad: int, run: Any) -> Tensor:
    """As diffusers' community pipeline lpw_stable_diffusion_xl: 75 at a time, each framed, side by side."""
    parts = []
    for start in range(0, len(ids), 75):
        part = ids[start : start + 75]
        parts.append(run(torch.tensor([[START, *part, END, *[pad] * (75 - len(part))]])))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_long_prompts_are_the_long_prompt_recipe_with_transformers_towers(syntax: str) -> None:
    clip_l, openclip = towers("base")
    their = {"text_encoder": peers.transformers_clip(clip_l), "text_encoder_2": peers.transformers_openclip(openclip)}
    prompt = " ".join(random.Random(0).choices(["cat", "dog", "tree", "red", "blue", "house"], k=170))
    prompt_2 = " ".join(random.Random(1).choices(["sky", "sun", "cloud"], k=160))
    context, pooled = encode_prompts(clip_l, openclip, [prompt], [prompt_2], "cpu", syntax=syntax)

    def hidden(name: str) -> Any:
        return lambda tokens: their[name](tokens, output_hidden_states=True).hidden_states[-2]

    theirs_l = long_prompt_recipe(encode(prompt), END, hidden("text_encoder"))
    theirs_g = long_prompt_recipe(encode(prompt_2), 0, hidden("text_encoder_2"))
    assert context.shape[1] == 231
    assert peers.distance(context, torch.cat([theirs_l, theirs_g], dim=2)) < FLOAT32
    first = long_prompt_recipe(encode(prompt_2)[:75], 0, lambda tokens: their["text_encoder_2"](tokens).text_embeds)
    assert peers.distance(pooled, first) < FLOAT32


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_the_towers_read_texts_of_unlike_lengths(syntax: str) -> None:
    """The shorter one has an empty chunk behind, in both tools."""
    clip_l, openclip = towers("base")
    context, _ = encode_prompts(clip_l, openclip, ["a cat"], ["dog " * 80], "cpu", syntax=syntax)
    rows = torch.tensor([[START, *encode("a cat"), END, *[END] * 73], [START, END, *[END] * 75]])
    assert context.shape == (1, 154, 96)
    assert peers.distance(context[..., :32], clip_l(rows).flatten(0, 1)[None]) < FLOAT32


def test_a_prompt_of_5000_tokens() -> None:
    prompt = "a cat, (red:1.2) dog, " * 835
    context, _ = encode_prompts(*towers("refiner"), [prompt, ""], [prompt, ""], "cpu", syntax="a1111")
    assert context.shape[0] == 2
    assert context.shape[1] >= 77 * 5000 / 75
    assert torch.isfinite(context).all()


# --- clip_skip ----------------------------------------------------------------------------------------------------


def deeper(kind: str) -> tuple[Any, Any]:
    """Towers of five layers, of unlike widths."""
    configs = pairs.CONFIGS[kind].text_encoders
    openclip = peers.small_openclip(replace(configs[-1], layers=5))
    return (peers.small_clip(replace(configs[0], layers=5)) if len(configs) == 2 else None), openclip


@pytest.mark.parametrize("clip_skip", sample([None, 0, 1, 2, 3], 1, 2))
@pytest.mark.parametrize("kind", sample(["base", "refiner"], "base"))
def test_clip_skip_is_diffusers(kind: str, clip_skip: int | None) -> None:
    clip_l, openclip = deeper(kind)
    parts = {
        "text_encoder": clip_l and peers.transformers_clip(clip_l),
        "text_encoder_2": peers.transformers_openclip(openclip),
    }
    name = "StableDiffusionXLPipeline"
    peer = pairs.diffusers_pipeline(name, kind, "EulerDiscreteScheduler", "leading", {}, **parts)
    prompts = ["a cup of coffee", "a dog"]
    theirs, _, their_pooled, _ = peer.encode_prompt(prompts, do_classifier_free_guidance=False, clip_skip=clip_skip)
    context, pooled = encode_prompts(clip_l, openclip, prompts, prompts, "cpu", clip_skip=clip_skip)
    assert peers.distance(context, theirs) < FLOAT32
    assert peers.distance(pooled, their_pooled) < FLOAT32


def test_clip_skip_leaves_no_hook_behind_and_changes_the_context_alone() -> None:
    clip_l, openclip = deeper("base")
    usual = encode_prompts(clip_l, openclip, ["a cat"], ["a cat"], "cpu")
    skipped = encode_prompts(clip_l, openclip, ["a cat"], ["a cat"], "cpu", clip_skip=2)
    again = encode_prompts(clip_l, openclip, ["a cat"], ["a cat"], "cpu")
    assert peers.distance(skipped[0], usual[0]) > 0.1
    assert torch.equal(skipped[1], usual[1])
    assert torch.equal(again[0], usual[0])
    assert not any(module._forward_hooks for tower in (clip_l, openclip) for module in tower.modules())


@pytest.mark.parametrize(
    ("clip_skip", "message"),
    [
        (4, "clip_skip must leave a layer: expected 0 to 3 for 5, found 4"),
        (-1, "clip_skip must be a number of layers, 0 or more, found -1"),
        (1.0, "found 1.0"),
        (True, "found True"),
    ],
)
def test_a_clip_skip_that_leaves_no_layer_is_an_error(clip_skip: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_prompts(*deeper("base"), ["a"], ["a"], "cpu", clip_skip=clip_skip)


# --- towers of every kind -----------------------------------------------------------------------------------------


def everything(clip_l: Any, openclip: Any) -> tuple[Tensor, Tensor]:
    """Chunks, weights, vectors and an earlier state in one call."""
    inversions = Inversions(pairs.BASE.text_encoders)
    inversions.add("<x>", {"clip_l": torch.full((2, 32), 0.1), "clip_g": torch.full((2, 64), 0.1)})
    prompts = ["a (cat:1.2), embedding:<x> " + " tree" * 90, "b"]
    options: Any = {"syntax": "comfy", "clip_skip": 1, "inversions": inversions}
    return encode_prompts(clip_l, openclip, prompts, prompts, "cpu", **options)


def test_packed_towers() -> None:
    clip_l, openclip = towers("base")
    if why := why_not(openclip):
        pytest.skip(why)
    for ours, plain in zip(everything(pack(clip_l), pack(openclip)), everything(clip_l, openclip), strict=True):
        assert peers.distance(ours, plain) < FLOAT32


def test_towers_that_come_when_they_work(tiny_base_file: Path) -> None:
    offload = Offload("cpu")
    away = TextToImagePipeline.from_single_file(tiny_base_file, offload=offload)
    here = TextToImagePipeline.from_single_file(tiny_base_file)
    outputs = everything(away.text_encoder, away.text_encoder_2)
    assert all(map(torch.equal, outputs, everything(here.text_encoder, here.text_encoder_2)))
    assert offload.arrivals == ["base text_encoder", "base text_encoder_2"]


@pytest.mark.sweep  # torch.compile takes seconds to load
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_towers(in_place: bool) -> None:
    """Whose compiled graph would not see the hooks."""
    clip_l, openclip = pairs.own_networks("base")["text_encoder"], pairs.own_networks("base")["text_encoder_2"]
    plain = everything(clip_l, openclip)
    compiled: list[Any] = []
    for tower in (clip_l, openclip):
        if in_place:
            tower.compile(backend="eager")
        compiled.append(tower if in_place else torch.compile(tower, backend="eager"))
    usual = encode_text(*compiled, ["a cat"], ["a cat"], "cpu")  # compiles
    assert all(map(torch.equal, everything(*compiled), plain))
    assert all(map(torch.equal, encode_prompts(*compiled, ["a cat"], ["a cat"], "cpu"), usual))
