"""The size rule: shrink to an area, then crop the centre to sides that are multiples of 8."""

import math
import random

import numpy as np
import pytest
from PIL import Image

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import fit


@pytest.mark.parametrize(
    ("size", "box"),  # left, top, right, bottom
    [
        ((64, 64), (0, 0, 64, 64)),
        ((8, 8), (0, 0, 8, 8)),
        ((65, 71), (0, 3, 64, 67)),
        ((66, 15), (1, 3, 65, 11)),
        ((1023, 9), (3, 0, 1019, 8)),
    ],
)
def test_the_centre_is_cropped_to_multiples_of_8(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    places = np.dstack([x % 256, x // 256, y]).astype(np.uint8)  # each pixel tells where it was
    left, top, right, bottom = box
    assert np.array_equal(np.asarray(fit(Image.fromarray(places))), places[top:bottom, left:right])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2048, 2048), (1024, 1024)),
        ((3000, 3000), (1024, 1024)),
        ((4000, 3000), (1176, 880)),  # 1182.4 x 886.8
        ((3000, 4000), (880, 1176)),
        ((1025, 1024), (1024, 1016)),  # 1024.5 x 1023.5
        ((1920, 1080), (1360, 768)),  # 1365.3 x 768.0
        ((512, 2048), (512, 2048)),
        ((900, 1165), (896, 1160)),  # within the area: only cropped
        ((4520, 5800), (896, 1152)),  # 903.97 x 1159.96; 904 x 1160 would be 64 pixels too many
    ],
)
def test_large_pictures_are_shrunk_to_the_area(size: tuple[int, int], expected: tuple[int, int]) -> None:
    fitted = fit(Image.new("L", size, 77), 1024 * 1024)
    assert fitted.size == expected
    assert fitted.getextrema() == (77, 77)


def test_fitted_pictures_never_exceed_the_area_and_keep_their_proportions() -> None:
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(8, 300), rng.randint(8, 300)
        area = rng.choice([4096, 5000, 10_000, 65_536])
        width, height = fit(Image.new("1", size), area).size
        assert width % 8 == height % 8 == 0
        assert 0 < width * height <= area
        scale = min(1.0, math.sqrt(area / (size[0] * size[1])))
        assert -9 < width - scale * size[0] <= 1e-9
        assert -9 < height - scale * size[1] <= 1e-9


def test_shrinking_smooths() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # nearest neighbour would keep one of the two
    inner = np.asarray(fit(Image.fromarray(stripes), 16 * 16))[4:-4, 4:-4]
    assert np.abs(inner.astype(float) - 127.5).max() < 4


def test_nothing_is_enlarged() -> None:
    assert fit(Image.new("RGB", (16, 24)), 1024 * 1024).size == (16, 24)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (7, 7), (8, 7), (100_000, 9)])
def test_too_thin_pictures(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"at least 8x8 pixels, found {size[0]}x{size[1]}"):
        fit(Image.new("L", size), 1024 * 512)
