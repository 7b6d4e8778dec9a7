"""The invisible watermark, read back by the package's own decoder."""

import sys
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from sdxl_ref.config import InputError
from sdxl_ref.pictures.watermark import BITS, check, embed, read


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    with Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")) as opened:
        return opened.convert("RGB").resize((1024, 1024))


def wrong_bits(image: Image.Image) -> int:
    return sum(found != right for found, right in zip(read(image), BITS, strict=True))


def test_all_bits_are_read_back_at_1024_pixels(photo: Image.Image) -> None:
    assert len(BITS) == 48
    assert wrong_bits(embed(photo)) == 0
    assert wrong_bits(photo) > 12  # half agree by chance


def test_most_bits_are_read_back_at_512_pixels(photo: Image.Image) -> None:
    assert wrong_bits(embed(photo.resize((512, 512)))) <= 4  # the method loses some


def test_it_is_invisible(photo: Image.Image) -> None:
    difference = np.asarray(embed(photo)).astype(int) - np.asarray(photo)
    assert 0 < np.abs(difference).mean() < 3  # levels of 255


@pytest.mark.parametrize("size", [(64, 64), (255, 257)])
def test_a_small_picture_is_refused(size: tuple[int, int], photo: Image.Image) -> None:
    message = f"needs a picture of 256x256 pixels or more, found {size[0]}x{size[1]}"
    with pytest.raises(InputError, match=message):
        embed(photo.resize(size))
    with pytest.raises(InputError, match=message):
        check(*size)


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(InputError, match=r"pip install 'sdxl-ref\[watermark\]'"):
        check(256, 256)
