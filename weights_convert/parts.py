"""Parts that come from files of their own: an autoencoder, or a bigG text encoder (open_clip's own, for one)."""

import os
from dataclasses import replace
from pathlib import Path

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.folder import Folder
from sdxl_ref.weights.layouts import part_rules
from sdxl_ref.weights.lone_parts import NAMES, LonePart, find_part, model_around, open_part
from sdxl_ref.weights.opening import POCKET
from sdxl_ref.weights.tensor_files import FOLDER_INDEX


def separate_part(path: Path, part: str, config: ModelConfig) -> tuple[LonePart, Folder]:
    """A part of a file, of a folder, of a whole model or of the pocket pair, by its official names without a prefix.

    `config` is the model that it goes into. An autoencoder brings its scaling factor where it says one. InputError
    where tensors are missing, or of another shape.
    """
    lone = find_part(located(path, part, config.kind), part)
    if lone is None:
        raise InputError(f"{path} holds no {NAMES[part]}")
    if part == "vae":
        own, assumed = model_around(lone)
        if not assumed:
            config = replace(config, vae=replace(config.vae, scale_factor=own.vae.scale_factor))
    opened = open_part(lone, config)
    state, _ = part_rules(part, config)
    sources = {key: source for key, source in opened.sources.items() if key in state}
    return lone, replace(opened, sources=sources, shapes={key: source.shape for key, source in sources.items()})


def located(path: Path, part: str, kind: str) -> Path:
    """Where a part lies: in a file, in the subfolder of a whole model's folder, in the pocket pair."""
    if not os.path.exists(path):
        name = f"pocket-{kind}" if str(path) == "pocket" else str(path)
        if name not in POCKET:
            raise InputError(f"no such file: {path}")
        return POCKET[name]
    return path / part if (path / FOLDER_INDEX).is_file() else path
