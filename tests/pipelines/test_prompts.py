"""What runs read in place of plain prompts: embeds, other syntaxes, earlier hidden states, words that are vectors."""

from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from safetensors.torch import save_file

from sdxl_ref.config import InputError

MODELS = {"refiner": pairs.refiner, "base": pairs.base}
LONG = "a cup of coffee, " * 20  # two chunks


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    call = {"prompt": "a cup", "negative_prompt": "blurry", "num_inference_steps": 2, "generator": pairs.seeded(1)}
    call |= {"image": torch.full((1, 3, 64, 64), 0.5), "strength": 1.0, "output_type": "latent"}
    images: torch.Tensor = pipe(**call | arguments).images
    return images


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("negative_prompt", [None, "blurry"])
def test_embeds_handed_in_are_the_prompt(kind: str, negative_prompt: str | None) -> None:
    """Bit for bit, with names and order of diffusers; and by name as one call of `encode_prompt` returns them."""
    pipe = MODELS[kind]()
    embeds = pipe.encode_prompt("a cup", negative_prompt=negative_prompt)
    found = run(pipe, prompt=None, negative_prompt=None, **embeds._asdict())
    assert found.equal(run(pipe, negative_prompt=negative_prompt))


def test_embeds_of_one_side_stand_beside_a_prompt_of_the_other() -> None:
    pipe = pairs.refiner()
    embeds = pipe.encode_prompt("a cup", negative_prompt="blurry")
    positive = {"prompt_embeds": embeds.prompt_embeds, "pooled_prompt_embeds": embeds.pooled_prompt_embeds}
    negative = {name: value for name, value in embeds._asdict().items() if name.startswith("negative")}
    whole = run(pipe)
    for found in (run(pipe, prompt=None, **positive), run(pipe, negative_prompt=None, **negative)):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)  # the towers read fewer texts at once


def test_a_base_without_a_negative_side_has_zeros() -> None:
    pipe = pairs.base()
    embeds = pipe.encode_prompt("a cup", do_classifier_free_guidance=False)
    positive = {"prompt_embeds": embeds.prompt_embeds, "pooled_prompt_embeds": embeds.pooled_prompt_embeds}
    assert run(pipe, prompt=None, negative_prompt=None, **positive).equal(run(pipe, negative_prompt=None))


def test_embeds_of_several_pictures() -> None:
    pipe = pairs.refiner()
    embeds = pipe.encode_prompt(["a cup", "a dog"], negative_prompt="blurry")
    call = {"num_images_per_prompt": 2, "generator": pairs.seeds(1, 2, 3, 4)}
    found = run(pipe, prompt=None, negative_prompt=None, **embeds._asdict(), **call)
    expected = run(pipe, prompt=["a cup", "a dog"], **call | {"generator": pairs.seeds(1, 2, 3, 4)})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_syntaxes(kind: str) -> None:
    """Without markup all are one; weights and further chunks change the run."""
    pipe = MODELS[kind]()
    plain = run(pipe)
    for syntax in ("a1111", "comfy"):
        assert run(pipe, prompt_syntax=syntax).equal(plain)
        assert not run(pipe, prompt="a (cup:1.4)", prompt_syntax=syntax).equal(plain)
        assert not run(pipe, prompt=LONG, prompt_syntax=syntax).equal(run(pipe, prompt=LONG))


def test_chunks_on_one_side_alone() -> None:
    """The shorter side is filled up to as many tokens, so that both run as one batch."""
    embeds = pairs.base().encode_prompt(LONG, negative_prompt="blurry", prompt_syntax="a1111")
    assert embeds.prompt_embeds.shape[1] == 2 * 77
    assert embeds.negative_prompt_embeds is not None
    assert embeds.negative_prompt_embeds.shape == embeds.prompt_embeds.shape


def test_syntaxes_work_in_the_ensemble() -> None:
    pipe = pairs.ensemble()
    options = {"strength": 0.9, "num_inference_steps": 4, "switch": 0.5}
    assert not run(pipe, prompt="a (cup:1.4)", prompt_syntax="a1111", **options).equal(run(pipe, **options))


def test_clip_skip() -> None:
    pipe = pairs.base()
    assert run(pipe, clip_skip=0).equal(run(pipe))
    assert not run(pipe, clip_skip=1).equal(run(pipe))


def inversion(path: Path, **widths: int) -> Path:
    save_file({name: torch.randn(2, width, generator=pairs.seeded(3)) for name, width in widths.items()}, path)
    return path


def test_a_word_that_stands_for_vectors(tmp_path: Path) -> None:
    pipe = pairs.base()
    clip_l, clip_g = (tower.width for tower in pipe.config.text_encoders)
    before = run(pipe, prompt="a <cup>")
    pipe.load_textual_inversion(inversion(tmp_path / "cup.safetensors", clip_l=clip_l, clip_g=clip_g), token="<cup>")
    assert not run(pipe, prompt="a <cup>").equal(before)
    assert not run(pipe, prompt="a embedding:<cup>", prompt_syntax="comfy").equal(before)
    pipe.unload_textual_inversion()
    assert pipe.inversions is None
    assert run(pipe, prompt="a <cup>").equal(before)


def test_an_ensemble_reads_it_in_each_model_that_it_fits(tmp_path: Path) -> None:
    pipe = pairs.ensemble()
    clip_l, clip_g = (tower.width for tower in pipe.config.text_encoders)
    pipe.load_textual_inversion(inversion(tmp_path / "cup.safetensors", clip_l=clip_l, clip_g=clip_g), token="<cup>")
    assert [model.inversions.tokens for model in pipe.models()] == [["<cup>"], ["<cup>"]]
    pipe.unload_textual_inversion("<cup>")
    assert [model.inversions for model in pipe.models()] == [None, None]


WIDE = torch.zeros(1, 77, 999)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to read": ({"prompt": None}, "prompt must be a text, or one for each picture, found None"),
    "half a side": ({"prompt": None, "prompt_embeds": WIDE}, "belong together: hand in both, as encode_prompt"),
    "wrong width": (
        {"prompt": None, "prompt_embeds": WIDE, "pooled_prompt_embeds": WIDE[:, 0]},
        r"expected prompt_embeds \(b,77\*k,64\).*found \(1, 77, 999\)",
    ),
    "text and embeds": (
        {"prompt_embeds": WIDE, "pooled_prompt_embeds": WIDE[:, 0]},
        "prompt and prompt_embeds both say what is read: give one of them",
    ),
    "syntax": ({"prompt_syntax": "invoke"}, "unknown prompt_syntax 'invoke': expected one of plain, a1111, comfy"),
    "weight": ({"prompt": "a (cup:inf)", "prompt_syntax": "comfy"}, "a weight"),
    "skip": ({"clip_skip": 99}, "clip_skip must leave a layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        run(pairs.refiner(), **arguments)


def test_bad_inversions(tmp_path: Path) -> None:
    pipe = pairs.refiner()
    with pytest.raises(InputError, match="does not fit the model"):
        pipe.load_textual_inversion(inversion(tmp_path / "l.safetensors", clip_l=999))
    with pytest.raises(InputError, match="no textual inversion is loaded"):
        pipe.unload_textual_inversion()
    with pytest.raises(InputError, match="no token '<cup>' is loaded"):
        pipe.unload_textual_inversion("<cup>")
