"""Parts that come in files of their own: an autoencoder, or open_clip's bigG text tower."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights import layouts, separate_vae
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.folder import Source, stored_in
from sdxl_ref.weights.layouts import Rule
from sdxl_ref.weights.names import find_file


def vae_sources(path: Path, config: ModelConfig) -> dict[str, Source]:
    """Where a file or folder holds each tensor of the autoencoder, by its official key. See `separate_vae.py`."""
    stored, _ = separate_vae.read_vae(path)
    prefix = prefixes(config)["vae"]
    return {prefix + key: source for key, source in separate_vae.vae_sources(stored, config, path).items()}


def openclip_sources(path: Path, config: ModelConfig) -> dict[str, Source]:
    """Where open_clip's own file (`open_clip_model.safetensors`) holds each tensor of the text tower, by official key.

    Its names are the official ones. Newer files put `text.` before them; the picture tower (`visual.`) is left alone.
    `logit_scale`, which belongs to both towers, is read where it is there. InputError as `vae_sources` raises it.
    """
    file = weights_file(path)
    stored = stored_in(file)
    state, _ = layouts.part_rules("text_encoder_2", config)
    prefix_there = "text." if "text.token_embedding.weight" in stored else ""
    rules = [Rule(key, (prefix_there + key,)) for key in state if key != "logit_scale"]
    if "logit_scale" in stored:
        rules.append(Rule("logit_scale", ("logit_scale",)))
    return sources(file, prefixes(config)["text_encoder_2"], state, rules)


def sources(file: Path, prefix: str, state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Source]:
    """The tensors that these rules make of those in a file, by official key. InputError where one does not fit."""
    stored = stored_in(file)
    fitting = {}
    for rule in rules:
        absent = [name for name in rule.other if name not in stored]
        if absent:
            raise InputError(f"{file} does not hold this part at these sizes: no tensor {absent[0]}")
        source = Source(rule, [stored[name] for name in rule.other])
        expected = tuple(state[rule.official].shape)
        if source.shape != expected:
            raise InputError(f"{file}: {rule.official} has the shape {source.shape}, expected {expected}")
        fitting[prefix + rule.official] = source
    return fitting


def weights_file(path: Path) -> Path:
    """A file of weights, or the one of a folder. InputError as `find_file` raises it."""
    if not os.path.exists(path):
        raise InputError(f"no such file: {path}")
    return find_file(path)
