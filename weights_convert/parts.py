"""Parts that come in files of their own: an autoencoder, or open_clip's bigG text tower."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ref import layouts
from sdxl_ref.checkpoint import PICKLES, build_empty
from sdxl_ref.config import REFINER_1_0, InputError, ModelConfig

Tensors = Callable[[], Tensor]


def vae_tensors(path: Path, config: ModelConfig) -> dict[str, Tensors]:
    """An autoencoder's tensors by official name, from a file or folder in official or diffusers' names.

    Reads the official separate file (1.0, 0.9), a whole checkpoint, or diffusers' (such as fp16-fix). InputError where
    tensors are missing, or of another shape.
    """
    file, state = weights_file(path), build_empty("vae", config).state_dict()
    names = names_in(file)
    prefix = "first_stage_model." if any(name.startswith("first_stage_model.") for name in names) else ""
    if all(prefix + key in names for key in state):
        return checked(file, state, {key: ([prefix + key], None) for key in state}, names)
    rules = layouts.rules("vae", state, config.vae)
    return checked(file, state, {rule.official: (list(rule.other), rule) for rule in rules}, names)


def openclip_tensors(path: Path, config: ModelConfig) -> dict[str, Tensors]:
    """The text tower of open_clip's own file (`open_clip_model.safetensors`), whose names are the official ones.

    Newer files of open_clip put `text.` before them; the picture tower (`visual.`) is left alone. `logit_scale`, which
    belongs to both towers, is read where it is there.
    """
    file, state = weights_file(path), build_empty("text_encoder_2", config).state_dict()
    names = names_in(file)
    prefix = "text." if "text.token_embedding.weight" in names else ""
    where = {key: ([key if key == "logit_scale" else prefix + key], None) for key in state}
    if "logit_scale" not in names:
        del where["logit_scale"]
    return checked(file, state, where, names)


def is_vae(file: Path) -> bool:
    """Whether a file holds an autoencoder of SDXL's, in official or diffusers' names, and no other part."""
    state, names = build_empty("vae", REFINER_1_0).state_dict(), names_in(file)
    official = set(state) <= {name.removeprefix("first_stage_model.") for name in names}
    other = {name for rule in layouts.rules("vae", state, REFINER_1_0.vae) for name in rule.other} <= names
    return (official or other) and not any(name.startswith(("model.", "conditioner.")) for name in names)


def checked(
    file: Path, state: Mapping[str, Tensor], where: Mapping[str, tuple[list[str], layouts.Rule | None]], names: set[str]
) -> dict[str, Tensors]:
    """A function for each tensor that reads it; InputError where one is missing or of another shape."""
    found: dict[str, Tensors] = {}
    for key, (sources, rule) in where.items():
        absent = [name for name in sources if name not in names]
        if absent:
            raise InputError(f"{file} does not hold this part at these sizes: no tensor {absent[0]}")
        found[key] = partial(one, file, sources, rule)
        shape = found[key]().shape
        if shape != state[key].shape:
            raise InputError(f"{file}: {key} has the shape {tuple(shape)}, expected {tuple(state[key].shape)}")
    return found


def names_in(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {file}: {error}") from error


def one(file: Path, sources: list[str], rule: layouts.Rule | None) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensors = [opened.get_tensor(name) for name in sources]
    return tensors[0] if rule is None else rule.join(tensors)


def weights_file(path: Path) -> Path:
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path} is a pickle, which can run any code when opened: expected a safetensors file")
    if os.path.isdir(path):
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(f"expected one .safetensors file in {path}, found {len(found)}: name the file")
        return found[0]
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    return path
