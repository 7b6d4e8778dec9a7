"""Checkpoints for tests: tiny models whose shapes tell all of their sizes, files with a right header and no data."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY, build, build_empty, prefixes
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.stated_config import config_to_json

OPENCLIP = TextEncoderConfig(width=64, heads=1, layers=2, embed_dim=48)
CLIP = TextEncoderConfig(width=128, heads=2, layers=3, embed_dim=128, activation="quick_gelu")
# In canonical form and with 64 channels a head everywhere, so that the shapes tell all of it.
REFINER = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=64,
        num_res_blocks=1,
        channel_mult=(1, 2, 3),
        attention_resolutions=(2,),
        num_head_channels=64,
        transformer_depth=(1, 2, 3),
        context_dim=64,
        adm_in_channels=48 + 5 * 256,
    ),
    text_encoders=(OPENCLIP,),
    vae=VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
)
BASE = ModelConfig(
    unet=replace(
        REFINER.unet,
        num_res_blocks=2,
        channel_mult=(1, 2),
        attention_resolutions=(1, 2),
        transformer_depth=(1, 2),
        context_dim=128 + 64,
        adm_in_channels=48 + 6 * 256,
    ),
    text_encoders=(CLIP, OPENCLIP),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2),
)
CONFIGS = {"refiner": REFINER, "base": BASE}
kinds = pytest.mark.parametrize("kind", CONFIGS)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
NORM = "first_stage_model.decoder.norm_out.weight"
LOGIT_SCALE = {
    "refiner": "conditioner.embedders.0.model.logit_scale",
    "base": "conditioner.embedders.1.model.logit_scale",
}


@lru_cache(maxsize=8)
def _parts_of(config: ModelConfig) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {part: build(part, config) for part in prefixes(config)}


def parts_of(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks of a model, always with the same weights; the test's own."""
    return copy.deepcopy(_parts_of(config))


def metadata(config: ModelConfig = REFINER) -> dict[str, str]:
    return {CONFIG_KEY: config_to_json(config)}


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(state), path, metadata)
    return path


def error_of(path: Path) -> str:
    """What is said of a file that is no checkpoint."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def same(found: ModelConfig, expected: ModelConfig) -> bool:
    """Whether configurations are equal but for the order of `attention_resolutions`, which has no meaning."""

    def canonical(config: ModelConfig) -> dict[str, Any]:
        raw = asdict(config)
        raw["unet"]["attention_resolutions"] = sorted(raw["unet"]["attention_resolutions"])
        return raw

    return canonical(found) == canonical(expected)


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A file of full length whose data are one hole: right header, no disk, no memory. float16."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in sorted(shapes):
        begin, end = end, end + 2 * math.prod(shapes[key])
        header[key] = {"dtype": "F16", "shape": list(shapes[key]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


# --- the official lists -------------------------------------------------------------------------------------------

OFFICIAL = Path(__file__).parent / "official"
RELEASED = {"refiner": (REFINER_1_0, "sd_xl_refiner_1.0.tsv"), "base": (BASE_1_0, "sd_xl_base_1.0.tsv")}
released = pytest.mark.parametrize("kind", RELEASED)


def listed_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Every key and shape as the official code builds them, from the lists beside the tests."""
    lines = (line.split("\t") for line in (OFFICIAL / RELEASED[kind][1]).read_text().splitlines())
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in lines}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key and shape of our networks."""
    states = {prefix: build_empty(part, config).state_dict() for part, prefix in prefixes(config).items()}
    return {prefix + key: tuple(tensor.shape) for prefix, state in states.items() for key, tensor in state.items()}
