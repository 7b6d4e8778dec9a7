"""Safetensors files: opened with one error for all that can be wrong with them, their dtypes, their hashes.

Only safetensors is opened, never a pickle, which can run any code, nor what is no file: a pipe would never end.
What is wrong with a file is found out by `other_files.py`, which is imported when something is.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sdxl_ref.config import InputError

FOLDER_INDEX = "model_index.json"  # what makes a folder one in diffusers' layout
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # a key of `DTYPES` (dtypes.py), or a name that no weights have


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """safetensors' `safe_open`: tensors are mapped, not read. InputError where this is no such file, or not whole."""
    is_pickle = path.suffix.lower() in PICKLES
    try:
        if is_pickle or not path.is_file():
            raise OSError("not a safetensors file")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        from sdxl_ref.weights.other_files import what_is_wrong

        raise InputError(what_is_wrong(path, error, is_pickle)) from error


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


def stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from another one under its name, and from itself after a change; empty where there is none."""
    if not path.exists():
        return ()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sha256_of(*paths: Path, start: int = 0) -> str:
    """Of files, one behind the other, each from byte `start` on; read once, through one small block of memory."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while count := file.readinto(block):
                digest.update(block[:count])
    return digest.hexdigest()
