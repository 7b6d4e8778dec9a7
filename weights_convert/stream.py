"""Write safetensors files a tensor at a time: memory of one of them, whatever the file's size.

The format is that of huggingface/safetensors: 8 bytes of length, a JSON header, then the tensors one behind the other.
A file is written beside its target and renamed when it is whole: a kill at any moment leaves the old state.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.folder import INDEX

DTYPES = {
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HASH_KEY = "modelspec.hash_sha256"  # ModelSpec: of all tensors' bytes, as "0x" and 64 digits
EMPTY_HASH = "0x" + "0" * 64
Progress = Callable[[int], object]  # called with the bytes that were written


class Entry(NamedTuple):
    """A tensor to be written: `read` is called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtypes_in(path: Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor in a file, from its header. InputError for one that no weights have."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {path}: {error}") from error
    for name, dtype in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} has the dtype {dtype}, expected one of {', '.join(DTYPES)}")
    return {name: DTYPES[dtype] for name, dtype in found.items()}


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for entry in entries:
        if entry.dtype not in NAMES:
            raise InputError(f"{entry.name} has the dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
        begin, end = end, end + entry.bytes
        fields[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], progress: Progress = lambda _: None
) -> str:
    """Write a file at its final name, with nothing beside: see `write_beside`. Returns the sha256 of the tensors.

    Where the metadata has HASH_KEY, its value is put in once all tensors have been written: the same header again.
    """
    hashed, digest = HASH_KEY in metadata, hashlib.sha256()
    start = header(entries, {**metadata, HASH_KEY: EMPTY_HASH} if hashed else metadata)
    with path.open("wb") as file:
        file.write(start)
        for entry in entries:
            tensor = entry.read()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise InputError(f"{entry.name} changed while it was read: expected {entry.dtype} {entry.shape}")
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digest.update(data)
            file.write(data)
            progress(len(data))
        if hashed:
            file.seek(0)
            file.write(header(entries, {**metadata, HASH_KEY: f"0x{digest.hexdigest()}"}))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def beside(target: Path) -> Path:
    """Where this process writes a target before it has its name: two processes do not write into one file."""
    return target.with_name(f".{short(target)}.{os.getpid()}.part")


def short(target: Path) -> str:
    """So much of a target's name that there is room for more: 255 bytes are the most that a name may have."""
    return os.fsdecode(os.fsencode(target.name)[:200])


def clear_what_was_left(target: Path) -> None:
    """Delete what processes that are no more have left beside a target, so that nothing piles up."""
    for path in target.parent.glob(f".{glob.escape(short(target))}.*.part"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not running(int(process)):
            clear(path)


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_target(target: Path, size: int, force: bool) -> None:
    """InputError unless `size` bytes can be written there, and nothing is there yet (or `force` is given)."""
    if target.name in ("", ".."):
        raise InputError(f"expected a target with a name of its own, found {target}: name the file or folder")
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    if target.exists() and not force:
        raise InputError(f"{target} is there already: name another target, or give --force to replace it")
    if target.is_symlink() or (target.exists() and not (target.is_file() or target.is_dir())):
        raise InputError(f"{target} is a link or a device, no file or folder: name another target")
    if target.is_dir() and any(target.iterdir()) and not (target / INDEX).is_file():
        raise InputError(f"{target} is a folder that holds other things than a model: name another target")
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {target}: expected an existing, writable folder {folder}")
    clear_what_was_left(target)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{target} needs {size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def put_in_place(target: Path) -> None:
    """Give what was written beside its name, in one step where there was nothing, or a file."""
    new = beside(target)
    if not target.is_dir():
        new.replace(target)
        return
    old = target.with_name(f".{short(target)}.old")
    clear(old)
    if not _exchange(new, target):
        target.rename(old)
        new.rename(target)
    clear(new if new.exists() else old)


def _exchange(first: Path, second: Path) -> bool:
    """Linux swaps two names in one step (renameat2); False where that is not to be had."""
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        current, exchange = -100, 2
        return bool(libc.renameat2(current, os.fsencode(first), current, os.fsencode(second), exchange) == 0)
    except (AttributeError, OSError):
        return False


def total(entries: Iterable[Entry]) -> int:
    return sum(entry.bytes for entry in entries)
