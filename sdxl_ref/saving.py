"""Write safetensors files: networks as one file in the official layout, or latents."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_ref.checkpoint import CONFIG_KEY, prefixes
from sdxl_ref.config import InputError, ModelConfig

PREFIX = ".sdxl-ref-"


def save_checkpoint(path: Path, config: ModelConfig, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Write networks, their configuration in the metadata. See `write`."""
    state: dict[str, Tensor] = {}
    for part, prefix in prefixes(config).items():
        state |= {prefix + key: t.to(dtype).contiguous() for key, t in parts[part].state_dict().items()}
    write(path, state, {"format": "pt", CONFIG_KEY: config.to_json()})


def save_latents(path: Path, latents: Tensor, sigma: float) -> None:
    """Write latents (b,4,h,w) in sigma space, scaled by 0.13025, with their sigma in the metadata. See `write`."""
    write(path, {"latents": latents.cpu().contiguous()}, {"sigma": repr(sigma)})


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in the place of an older one. See `replacing`."""
    with replacing(path) as beside:
        save_file(state, beside, metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside the target, then renamed: an older one stays whole until then. InputError on failure.

    A process that is killed meanwhile leaves a folder beside it: `clear` deletes it.
    """
    try:
        with TemporaryDirectory(prefix=PREFIX, suffix=".part", dir=path.parent) as folder:
            yield (beside := Path(folder) / "new")
            mask = os.umask(0)  # safetensors writes for the owner alone
            os.umask(mask)
            beside.chmod(0o666 & ~mask)
            with beside.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave a renamed file of zeros
            beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"could not write {path}: {getattr(error, 'strerror', None) or error}") from error


def clear(folder: Path) -> None:
    """Delete what processes that were killed while they wrote left in a folder."""
    for left in folder.glob(f"{PREFIX}*.part"):
        shutil.rmtree(left, ignore_errors=True)
