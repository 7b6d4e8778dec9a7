"""Write networks as one file in the official layout."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sdxl_ref.checkpoint import CONFIG_KEY, prefixes
from sdxl_ref.config import ModelConfig


def save_checkpoint(path: Path, config: ModelConfig, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Write networks as one file in the official layout, its configuration in the metadata.

    Written beside the target and then renamed: an older file stays whole until the new one is.
    """
    state: dict[str, torch.Tensor] = {}
    for part, prefix in prefixes(config).items():
        state |= {prefix + key: t.to(dtype).contiguous() for key, t in parts[part].state_dict().items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, beside, {"format": "pt", CONFIG_KEY: config.to_json()})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
