"""Write safetensors files a tensor at a time: memory of one of them, whatever the file's size.

The format is that of huggingface/safetensors: 8 bytes of length, a JSON header, then the tensors one behind the other.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.weights.dtypes import DTYPE_NAMES, DTYPES

HASH_KEY = "modelspec.hash_sha256"  # ModelSpec: of all tensors' bytes, as "0x" and 64 digits
EMPTY_HASH = "0x" + "0" * 64
ALIGNMENT = 8  # bytes: the tensors begin at a multiple
Progress = Callable[[int], object]  # called with the number of bytes that were written


class Entry(NamedTuple):
    """A tensor to be written: `read` is called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def checked(self) -> Tensor:
        """The tensor. InputError where it is no longer what it was when the file's header was written."""
        tensor = self.read()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            expected = f"expected {self.dtype} {self.shape}, found {tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(f"{self.name} changed while it was read: {expected}: start again")
        return tensor


def total(entries: Iterable[Entry]) -> int:
    """Bytes of all tensors."""
    return sum(entry.bytes for entry in entries)


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with. InputError for a dtype that no weights have."""
    fields: dict[str, object] = {}
    if metadata:
        fields["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise InputError(f"{entry.name} has the dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
        end = begin + entry.bytes
        fields[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], progress: Progress = lambda _: None
) -> str:
    """Write a file as it goes, so at a path that `saving.replacing` gives. Returns the sha256 of the tensors' bytes.

    Where the metadata has HASH_KEY, its value is put in once all tensors have been written: the same header again.
    """
    is_hashed = HASH_KEY in metadata
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(header(entries, {**metadata, HASH_KEY: EMPTY_HASH} if is_hashed else metadata))
        for entry in entries:
            values = bytes_of(entry.checked())
            digest.update(values)
            file.write(values)
            progress(len(values))
        if is_hashed:
            file.seek(0)
            file.write(header(entries, {**metadata, HASH_KEY: f"0x{digest.hexdigest()}"}))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as a file holds them, without a copy where they lie in one piece."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
