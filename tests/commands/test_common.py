"""What the commands that make pictures share: the written picture, adapters' words, devices, memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import pixels, settings, texts
from PIL import Image

from sdxl_ref.commands.adapter_options import path_and_scale
from sdxl_ref.commands.common import pick_device, save_picture
from sdxl_ref.config import InputError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
SETTINGS = {"prompt": "a café\nsecond line", "seed": 0, "versions": {"sdxl_ref": "0.1.0"}}

# --- the written picture ------------------------------------------------------------------------------------------


def test_a_picture_is_written_with_its_settings_in_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    save_picture(PICTURE, path, SETTINGS)
    assert os.listdir(tmp_path) == ["out.png"]
    assert np.array_equal(pixels(path), np.asarray(PICTURE))
    assert settings(path) == SETTINGS
    assert texts(path)["parameters"] == "a café\nsecond line\nSeed: 0, Version: sdxl-ref 0.1.0"


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full_disk(self: Image.Image, target: Path, **_: Any) -> None:
        target.write_bytes(b"half a pictu")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match=r"could not write .*out\.png: No space left on device"):
        save_picture(PICTURE, path, SETTINGS)
    assert os.listdir(tmp_path) == ["out.png"]
    assert path.read_bytes() == b"old"


# --- adapters' words ----------------------------------------------------------------------------------------------


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


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_best_that_is_there(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == torch.device(expected)


def test_a_device_by_its_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
