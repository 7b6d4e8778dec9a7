"""Parts that lie alone: told by their names, their sizes by their shapes, at official size from headers alone."""

from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from checkpoints import sparse_file
from safetensors.torch import save_file

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY, prefixes
from sdxl_ref.weights.layouts import part_rules, to_other
from sdxl_ref.weights.lone_parts import find_lone_part, find_part, model_around, open_part
from sdxl_ref.weights.report import describe
from sdxl_ref.weights.stated_config import config_to_json

RELEASED = {"base": BASE_1_0, "refiner": REFINER_1_0}
NAMES = {
    "unet": "an SDXL UNet (by its keys)",
    "vae": "an SDXL autoencoder (by its keys)",
    "text_encoder": "an SDXL CLIP-L text encoder (by its keys)",
    "text_encoder_2": "an SDXL OpenCLIP bigG text encoder (by its keys)",
}
Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: ModelConfig, part: str, layout: str) -> Shapes:
    """Names and shapes of a part in a layout, without a prefix."""
    state, rules = part_rules(part, config)
    tensors = state if layout == "official" else to_other(rules, state)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, config in RELEASED.items() for part in prefixes(config)]
)
def test_official_parts_are_told_from_their_headers(kind: str, part: str, layout: str, tmp_path: Path) -> None:
    """Their sizes too, with and without the prefix that they have in a checkpoint."""
    config = RELEASED[kind]
    shapes = shapes_of(config, part, layout)
    for prefix in ("", prefixes(config)[part] if layout == "official" else "model."):
        path = sparse_file(tmp_path / "a.safetensors", {prefix + name: shape for name, shape in shapes.items()})
        lone = find_lone_part(path)
        assert lone is not None
        assert (lone.part, lone.name, lone.prefix) == (part, NAMES[part], prefix)
        found, _ = model_around(lone)
        expected = getattr(config, part, None) or config.text_encoders[0 if part == "text_encoder" else -1]
        assert (getattr(found, part, None) or found.text_encoders[0 if part == "text_encoder" else -1]) == expected
        assert open_part(lone).shapes.keys() == shapes_of(config, part, "official").keys() - (
            {"logit_scale"} if layout == "diffusers" else set()
        )


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_sizes_that_are_not_the_official_ones(layout: str, tmp_path: Path) -> None:
    """Of a UNet whose levels have several depths, and none."""
    unet = replace(peers.SMALL_BASE.unet, model_channels=64, num_head_channels=64)
    config = replace(peers.SMALL_BASE, unet=unet)
    lone = find_lone_part(sparse_file(tmp_path / "a.safetensors", shapes_of(config, "unet", layout)))
    assert lone is not None
    found, note = model_around(lone)
    assert note == "no config.json: sizes read from the shapes, 64 channels a head assumed"
    assert found.unet.depths[1:] == unet.depths[1:]  # the first level has no attention, whose depth would tell
    assert replace(found.unet, transformer_depth=1, attention_resolutions=(4, 2)) == replace(
        unet, transformer_depth=1, attention_resolutions=(4, 2)
    )
    assert sorted(found.unet.attention_resolutions) == sorted(unet.attention_resolutions)


def test_names_of_transformers_5(tmp_path: Path) -> None:
    """Its `CLIPTextModel` is written without `text_model.`."""
    shapes = shapes_of(BASE_1_0, "text_encoder", "diffusers")
    short = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    lone = find_lone_part(sparse_file(tmp_path / "a.safetensors", short))
    assert lone is not None
    assert lone.part == "text_encoder"
    assert open_part(lone).config == BASE_1_0
    assert open_part(lone).shapes == shapes


def test_a_clip_l_with_a_projection_is_none_of_bigg(tmp_path: Path) -> None:
    shapes = shapes_of(BASE_1_0, "text_encoder", "diffusers") | {"text_projection.weight": (768, 768)}
    lone = find_lone_part(sparse_file(tmp_path / "a.safetensors", shapes))
    assert lone is not None
    assert lone.part == "text_encoder"


def test_what_is_no_part_alone(small_refiner_file: Path, tmp_path: Path) -> None:
    """A whole model, a ControlNet, whose names are a UNet's but for the way up, and nothing of the kind."""
    assert find_lone_part(small_refiner_file) is None
    unet = shapes_of(REFINER_1_0, "unet", "diffusers")
    control = {name: shape for name, shape in unet.items() if "up_blocks" not in name}
    for shapes in (control | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, {"latents": (1, 4, 8, 8)}):
        assert find_lone_part(sparse_file(tmp_path / "a.safetensors", shapes)) is None


def test_a_part_among_others(small_refiner_file: Path) -> None:
    """Its tensors alone are opened."""
    lone = find_part(small_refiner_file, "vae")
    assert lone is not None
    assert open_part(lone).shapes.keys() == part_rules("vae", peers.SMALL_REFINER)[0].keys()
    assert find_part(small_refiner_file, "text_encoder") is None


@pytest.mark.parametrize("part", NAMES)
def test_a_part_is_described(part: str, tmp_path: Path) -> None:
    """Parts with counts and dtypes; extras; metadata; the autoencoder alone by its hash."""
    config = peers.SMALL_BASE
    state, rules = part_rules(part, config)
    extra = {"text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64)} if "text" in part else {}
    tensors = {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes_of(config, part, "diffusers").items()
    }
    save_file(
        tensors | extra, tmp_path / "a.safetensors", {CONFIG_KEY: config_to_json(config), "modelspec.title": "a part"}
    )
    found = describe(tmp_path / "a.safetensors")
    assert found.model == NAMES[part]
    assert list(found.parts) == [part]
    assert found.parts[part].tensors == len(tensors)
    assert found.parts[part].parameters == sum(value.numel() for key, value in state.items() if key != "logit_scale")
    assert found.parts[part].dtypes == {torch.bfloat16}
    assert found.extras == tuple(extra)
    assert "modelspec.title: a part" in found.lines()
    assert bool(found.vae) == (part == "vae")
    assert describe(tmp_path / "a.safetensors", check=True).checks[1] == "finite: every value of every tensor"
    assert len(rules) == len(state)


def test_a_part_that_is_not_whole_is_described_with_what_is_missing(tmp_path: Path) -> None:
    shapes = shapes_of(REFINER_1_0, "vae", "official")
    del shapes["encoder.conv_in.bias"]
    path = sparse_file(tmp_path / "a.safetensors", shapes)
    assert "do not fit: 1 missing: encoder.conv_in.bias" in describe(path).note
    lone = find_lone_part(path)
    assert lone is not None
    with pytest.raises(InputError, match=r"1 missing: encoder\.conv_in\.bias"):
        open_part(lone)
