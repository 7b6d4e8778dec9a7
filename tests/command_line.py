"""`sdxl-ref` in tests: in this process or as one, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_ref.cli import main
from sdxl_ref.pictures.images import load_image


class Refine:
    """`refine` on a checkpoint and a picture; options are replaced by name, or left out with None."""

    def __init__(self, photo: Path, checkpoint: Path) -> None:
        self.image = str(photo)
        self.options: dict[str, Any] = {"prompt": "a cat", "checkpoint": checkpoint, "steps": 4, "strength": 0.5}

    def words(self, image: Any = None, **changes: Any) -> list[str]:
        words = ["refine", str(image or self.image)]
        for name, value in (self.options | changes).items():
            if value is not None:
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
        return words

    def __call__(self, image: Any = None, **changes: Any) -> int:
        return main(self.words(image, **changes))


def process(words: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdxl_ref", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def texts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return dict(image.text)  # type: ignore[attr-defined]


def settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(texts(path)["sdxl_ref"])
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path))


def assert_one_line(error: str, message: str) -> None:
    """That bad input was answered with one line, which says this."""
    print(error.rstrip())  # `pytest -s -k bad_input` lists them all
    assert error.startswith("sdxl-ref: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert len(error) < 600


class Stopped(Exception):  # noqa: N818 (it is none)
    """Raised in place of the work that a test does not need."""


def stop(*_: Any, **__: Any) -> None:
    raise Stopped
