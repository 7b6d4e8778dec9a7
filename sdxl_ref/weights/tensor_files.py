"""Safetensors files: opened with one error for all that can be wrong with them, their dtypes, their hashes.

Only safetensors is opened, never a pickle, which can run any code.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ref.config import InputError

DTYPES = {  # by the names that the format gives them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FOLDER_INDEX = "model_index.json"  # what makes a folder one in diffusers' layout
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES, or a name that no weights have


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """safetensors' `safe_open`: tensors are mapped, not read. InputError where this is no such file, or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {path}: {error}") from error


def read_headers(path: Path) -> dict[str, Header]:
    """Shape and dtype of every tensor in a file, by name. InputError as `open_tensors` raises it."""
    headers = {}
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            headers[name] = Header(tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header. InputError as `open_tensors` raises it."""
    with open_tensors(path) as file:
        return dict(file.metadata() or {})


def is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in any dtype that weights come in: torch cannot tell it of 8-bit ones."""
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def sha256_of(*paths: Path, start: int = 0) -> str:
    """Of files, one behind the other, each from byte `start` on; read once, in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
