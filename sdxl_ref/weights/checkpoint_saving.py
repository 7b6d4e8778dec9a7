"""Write networks as one checkpoint in the official layout."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_ref.config import ModelConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY, prefixes
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.stated_config import config_to_json


def save_checkpoint(path: Path, config: ModelConfig, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Write networks, their configuration in the metadata. InputError as `replacing` raises it."""
    state: dict[str, Tensor] = {}
    for part, prefix in prefixes(config).items():
        state |= {prefix + key: t.to(dtype).contiguous() for key, t in parts[part].state_dict().items()}
    write_tensors(path, state, {"format": "pt", CONFIG_KEY: config_to_json(config)})
