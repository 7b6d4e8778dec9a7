"""Tensors and texts as files that are never half written."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sdxl_ref.weights.saving import replacing


def save_latents(path: Path, latents: Tensor, sigma: float) -> None:
    """Write latents (b,4,h,w) in sigma space, scaled by 0.13025, with their sigma in the metadata."""
    write_tensors(path, {"latents": latents.cpu().contiguous()}, {"sigma": repr(sigma)})


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the place of an older one. InputError as `replacing` raises it."""
    with replacing(path) as beside:
        save_file(dict(state), beside, dict(metadata))
        sort_metadata(beside)


def sort_metadata(path: Path) -> None:
    """Put a file's metadata in order, in place: safetensors writes them in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length  # what follows are the tensors
        file.seek(8)
        file.write(text.ljust(length))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 in the place of an older one. InputError as `replacing` raises it."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
