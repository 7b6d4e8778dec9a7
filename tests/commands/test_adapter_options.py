"""The words of `--lora`: a file and its scale."""

from pathlib import Path

import pytest

from sdxl_ref.commands.adapter_options import adapter_files, path_and_scale
from sdxl_ref.config import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", (Path("a.safetensors"), 1.0)),
        ("a.safetensors:0.5", (Path("a.safetensors"), 0.5)),
        ("a.safetensors:-2", (Path("a.safetensors"), -2.0)),
        ("C:style.safetensors", (Path("C:style.safetensors"), 1.0)),
        ("a:b.safetensors:0.5", (Path("a:b.safetensors"), 0.5)),
    ],
)
def test_a_file_and_its_scale(text: str, expected: tuple[Path, float]) -> None:
    assert path_and_scale(text) == expected


@pytest.mark.parametrize("text", ["a.safetensors:nan", "a.safetensors:inf"])
def test_a_scale_is_finite(text: str) -> None:
    with pytest.raises(InputError, match=f"must be a finite number, found {text}"):
        path_and_scale(text)


def test_each_file_is_named_once() -> None:
    assert adapter_files(["a:0.5", "b", "a"]) == [Path("a"), Path("b")]
