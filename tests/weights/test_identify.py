"""The sizes of a model: from the configuration in the metadata, or else from the shapes; odd ones are refused."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIGS,
    FIRST,
    LABEL,
    OPENCLIP,
    REFINER,
    RELEASED,
    error_of,
    expected_shapes,
    kinds,
    metadata,
    parts_of,
    released,
    same,
    sparse_file,
    write,
)
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.identify import config_from_shapes
from sdxl_ref.weights.identity import name_of
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.stated_config import config_from_json, config_to_json

# --- from the shapes ----------------------------------------------------------------------------------------------


@kinds
def test_without_a_configuration_the_shapes_tell(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "a.safetensors", load_file(files[kind])))
    assert found.note == f"no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
    assert name_of(found) == f"SDXL-like {kind}"
    assert found.config.kind == kind
    assert same(found.config, CONFIGS[kind])


@released
def test_the_shapes_of_the_official_models_tell_the_official_sizes(kind: str) -> None:
    official = RELEASED[kind][0]
    inferred = config_from_shapes(expected_shapes(official))
    *depths, middle = official.unet.depths
    levels = [depth if official.unet.has_attention(i) else 1 for i, depth in enumerate(depths)]
    assert same(inferred, replace(official, unet=replace(official.unet, transformer_depth=(*levels, middle))))


@pytest.mark.parametrize(
    "change",
    [
        {"unet": replace(REFINER.unet, model_channels=96, num_head_channels=32)},
        {"text_encoders": (replace(OPENCLIP, width=96),), "unet": replace(REFINER.unet, context_dim=96)},
    ],
    ids=["unet", "text"],
)
def test_other_head_sizes_need_the_configuration(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(REFINER, **change)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, config, parts_of(config), torch.float16)
    assert open_checkpoint(path).config == config
    line = error_of(write(path, load_file(path)))
    assert "the shapes do not tell the sizes: put them into the metadata, sdxl_ref.config" in line
    assert "no heads of 64 channels" in line or "must divide" in line


@pytest.mark.parametrize("prefix", ["first_stage_model.", "conditioner.", "model.diffusion_model.middle_block."])
def test_without_a_configuration_a_missing_part_is_bad_input(
    prefix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    assert 0 < len(rest) < len(state)
    error_of(write(tmp_path / "a.safetensors", rest))


READ = (  # what the sizes are read from
    FIRST,
    LABEL,
    "model.diffusion_model.out.2.weight",
    "model.diffusion_model.input_blocks.3.0.out_layers.3.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "conditioner.embedders.0.model.token_embedding.weight",
    "conditioner.embedders.0.model.text_projection",
    "conditioner.embedders.0.model.positional_embedding",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.down.1.block.0.conv1.weight",
    "first_stage_model.post_quant_conv.weight",
    "first_stage_model.decoder.conv_out.weight",
)
ODD_SHAPES = [(), (0,), (7, 7), (64,) * 5]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of torch, on a shape with a 0
@pytest.mark.parametrize(
    "shapes", [pytest.param(ODD_SHAPES[::2], id="some"), pytest.param(ODD_SHAPES[1::2], marks=pytest.mark.sweep)]
)
def test_without_a_configuration_odd_shapes_are_bad_input(
    shapes: list[tuple[int, ...]], files: dict[str, Path], tmp_path: Path
) -> None:
    """Any shape may be a lie: one InputError, no other exception."""
    path = tmp_path / "a.safetensors"
    right = dict(open_checkpoint(files["refiner"]).shapes)
    failures = []
    for key in [*READ, *random.Random(0).sample(sorted(right), 3)]:
        for shape in shapes:
            try:
                open_checkpoint(sparse_file(path, right | {key: shape}))
                failures.append(f"{key} {shape}: accepted")
            except InputError:
                pass
            except Exception as error:
                failures.append(f"{key} {shape}: {error!r}")
    assert failures == []


# --- from the configuration ---------------------------------------------------------------------------------------


def test_a_configuration_of_another_model_is_found_out(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = replace(REFINER, unet=replace(REFINER.unet, channel_mult=(1, 2, 2)))
    line = error_of(write(tmp_path / "a.safetensors", state, metadata(other)))
    assert "of another shape" in line
    assert "(expected 128, found 192)" in line


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(config for config, _ in RELEASED.values())])
def test_a_configuration_goes_through_json(config: ModelConfig) -> None:
    assert config_from_json(config_to_json(config)) == config


def odd_configurations() -> list[tuple[str, str]]:
    """(what is odd, JSON) with each value of a real configuration replaced in turn, and JSON of other kinds."""
    odd = [None, 0, -1, 1.5, "x", [0]]
    found: list[tuple[str, Any]] = [(f"whole {value!r}", value) for value in odd]

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            for value in odd:
                raw = json.loads(config_to_json(REFINER))
                place = raw
                for step in path:
                    place = place[step]
                place[key] = value
                found.append((f"{'.'.join(map(str, (*path, key)))} {value!r}", raw))
            if isinstance(node[key], dict | list):
                walk(node[key], (*path, key))

    walk(json.loads(config_to_json(REFINER)), ())
    return [(name, json.dumps(raw)) for name, raw in found] + [("no JSON", "{"), ("empty", "")]


UNSEEN = ("text_encoders.0.heads", "vae.scale_factor", "unet.num_head_channels")  # no shape tells whether it is right
IDLE = ("unet.transformer_depth.0 0", "vae.scale_factor 1.5")  # the depth of a level without attention; a fair factor
SEEN = [case for case in odd_configurations() if not case[0].startswith(UNSEEN)]
SAMPLE = random.Random(0).sample(SEEN, 40)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of torch, on a size of 0
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([case for case in odd_configurations() if case not in SEEN], id="no shape tells"),
        pytest.param(SAMPLE, id="some"),
        pytest.param([case for case in SEEN if case not in SAMPLE], id="others", marks=pytest.mark.sweep),
    ],
)
def test_an_odd_configuration_is_bad_input(
    cases: list[tuple[str, str]], files: dict[str, Path], tmp_path: Path
) -> None:
    """Every one of them is refused in one InputError: none builds, or none fits the tensors."""
    shapes = open_checkpoint(files["refiner"]).shapes
    path = tmp_path / "a.safetensors"
    failures = []
    for name, text in cases:
        try:
            open_checkpoint(sparse_file(path, shapes, {CONFIG_KEY: text}))
            if not name.startswith(IDLE):
                failures.append(f"{name}: accepted")
        except InputError:
            pass
        except Exception as error:
            failures.append(f"{name}: {error!r}")
    assert failures == []


ABSURD = [
    ("unet", "num_head_channels", 64.0, "num_head_channels must be whole numbers from 1 to a million, found 64.0"),
    ("unet", "num_res_blocks", True, "num_res_blocks must be whole numbers from 1 to a million, found True"),
    ("unet", "num_res_blocks", 10**6, "expected networks of at most 1000 blocks, found 9000000"),
    ("unet", "transformer_depth", 10**6, "expected networks of at most 1000 blocks, found 3000003"),
    ("unet", "attention_resolutions", [2, -4], "attention_resolutions must be whole numbers from 1"),
    ("unet", "context_dim", 10**18, "context_dim must be whole numbers from 1 to a million, found 10000"),
    ("text_encoders", "layers", 10**6, "expected networks of at most 1000 blocks, found 1000000"),
    ("text_encoders", "heads", -1, "heads must be whole numbers from 1 to a million, found -1"),
    ("vae", "num_res_blocks", 10**6, "expected networks of at most 1000 blocks, found 2000000"),
    *(("vae", "scale_factor", value, "a scale_factor above 0") for value in (0, -1, math.nan, math.inf, True)),
    ("", "resolution", math.inf, "resolution must be a multiple of 8 up to 10000, found inf"),
    ("", "resolution", 8 * 10**9, "resolution must be a multiple of 8 up to 10000, found 8000000000"),
    ("", "prediction", "w", "unknown prediction 'w': expected one of epsilon, v"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), ABSURD)
def test_an_absurd_configuration_is_told_at_once(
    part: str, field: str, value: Any, message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    raw = json.loads(config_to_json(REFINER))
    place = raw[part] if part else raw
    (place[0] if part == "text_encoders" else place)[field] = value
    path = write(tmp_path / "a.safetensors", state, {CONFIG_KEY: json.dumps(raw)})
    began = time.perf_counter()
    line = error_of(path)
    assert time.perf_counter() - began < 5  # building a million blocks takes minutes
    assert line.startswith("expected a configuration written by sdxl_ref, found ")
    assert message in line
    assert "\n" not in line
