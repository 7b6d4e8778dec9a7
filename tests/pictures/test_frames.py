"""A file that holds several pictures: the first is used, which is told; plain files are not noted."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_ref.pictures.images import load_image

FRAMES = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue", "green")]


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {}), ("a.png", {}), ("a.tiff", {}), ("a.webp", {"lossless": True})]
)
def test_the_first_is_used_and_told(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    FRAMES[0].save(tmp_path / name, save_all=True, append_images=FRAMES[1:], **options)
    with pytest.warns(UserWarning, match=f"{name} holds several pictures .*: the first alone is used") as caught:
        image = load_image(tmp_path / name)
    assert len(caught) == 1
    assert np.array_equal(np.asarray(image), np.asarray(FRAMES[0]))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tiff", "a.webp", "phone.mpo"])
def test_what_is_one_picture_is_not_noted(name: str, tmp_path: Path) -> None:
    """A phone's JPEG has previews and depths behind it; of frames that a caller steps through only the first is."""
    more: dict[str, Any] = {"save_all": True, "append_images": FRAMES[1:]} if name.endswith(".mpo") else {}
    FRAMES[0].save(tmp_path / name, **more)
    FRAMES[0].save(tmp_path / "steps.gif", save_all=True, append_images=FRAMES[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / name)
        with Image.open(tmp_path / "steps.gif") as frames:
            frames.seek(1)
            assert np.array_equal(np.asarray(load_image(frames)), np.asarray(FRAMES[1]))
