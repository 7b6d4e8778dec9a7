"""Safetensors files: one error for all that can be wrong with them; headers, finite values, hashes.

The format is safetensors' own to check: a case of each kind shows that what it refuses comes out as InputError.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import error_of
from safetensors.torch import save_file

from sdxl_ref.config import InputError
from sdxl_ref.weights.dtypes import DTYPES, is_finite
from sdxl_ref.weights.tensor_files import Header, open_tensors, read_headers, read_metadata, sha256_of


def header(entries: Any) -> bytes:
    """The head of a file, and 40 bytes of data."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 40


def entry(begin: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


NO_FILES = {
    "empty": b"",
    "something else": b"hello, I am no safetensors file",
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header that is no JSON": header(b"{'a'"),
    "a tensor past the end": header({"a": entry(0, 16), "b": entry(16, 99_999_984, (24_999_992,))}),
    "tensors that overlap": header({"a": entry(0, 16), "b": entry(8, 24)}),
    "a length that is not the shape's": header({"a": entry(0, 32)}),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_whole_file_is_one_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(NO_FILES[name])
    expected = f"expected a whole safetensors file, could not read {path}: "
    for read in (read_headers, read_metadata):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value).startswith(expected)
    assert error_of(path).startswith(expected)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0" * 8], ids=["shorter", "longer"])
def test_a_file_of_another_length_is_not_whole(change: Any, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(change(files["refiner"].read_bytes()))
    assert error_of(path).startswith("expected a whole safetensors file")


def test_an_error_while_a_file_is_read_is_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="could not read"), open_tensors(path) as file:
        file.get_tensor("b")


def test_headers_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.zeros((2, 3), dtype=dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, path, {"title": "a small one"})
    assert read_headers(path) == {name: Header((2, 3), name) for name in DTYPES}
    assert read_metadata(path) == {"title": "a small one"}


def test_metadata_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(())}, path)
    assert read_headers(path) == {"a": Header((), "F32")}
    assert read_metadata(path) == {}


FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite_are_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(3, 4).to(dtype)
    assert is_finite(tensor)
    tensor[1, 2] = value
    if dtype == torch.float8_e4m3fn and math.isinf(value):
        return  # which has no infinity
    assert not is_finite(tensor)


def test_a_hash_goes_over_several_files_and_may_start_later(tmp_path: Path) -> None:
    data = {"a": b"hello " * 9, "b": b"", "c": b"world"}
    paths = [tmp_path / name for name in data]
    for path in paths:
        path.write_bytes(data[path.name])
    assert sha256_of(*paths) == hashlib.sha256(b"".join(data.values())).hexdigest()
    assert sha256_of(paths[0], start=6) == hashlib.sha256(data["a"][6:]).hexdigest()
