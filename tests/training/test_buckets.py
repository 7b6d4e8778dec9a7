"""SDXL's aspect buckets: their sizes, how a picture comes into one, and batches of one bucket."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import gradient, speckled

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import load_image
from sdxl_ref.training.buckets import ResizedCrop, buckets, crop_to_bucket, draw_batch, fit_bucket


def test_buckets_are_those_of_the_paper() -> None:
    sizes = buckets(1024)
    assert len(sizes) == len(set(sizes)) == 40
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert all(abs(height * width / 1024**2 - 1) < 0.1 for height, width in sizes)
    ratios = [height / width for height, width in sizes]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[20], ratios[-1]) == (0.25, 1, 4)
    known = {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (1344, 768), (704, 1472), (640, 1536)}
    assert known <= set(sizes)


def test_buckets_scale_with_the_resolution() -> None:
    assert all(side % 8 == 0 for size in buckets(128) for side in size)
    for small, large in zip(buckets(128), buckets(1024), strict=True):
        assert (8 * small[0], 8 * small[1]) == large
    assert buckets(512)[0] == (256, 1024)
    for resolution in (0, -128, 64, 1000):
        with pytest.raises(InputError, match=f"multiple of 128, found {resolution}"):
            buckets(resolution)


def test_a_picture_of_a_buckets_size_goes_there_whole() -> None:
    for size in buckets(128):
        assert fit_bucket(size, buckets(128)) == ResizedCrop(size, size, (0, 0), size)
    image = speckled(0, 104, 152)  # 832x1216 at 1024
    assert crop_to_bucket(image, buckets(128))[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("size", "target", "resized", "crop"),
    [
        ((256, 256), (128, 128), (128, 128), (0, 0)),
        ((150, 200), (112, 144), (112, 149), (0, 2)),
        ((200, 150), (144, 112), (149, 112), (2, 0)),
        ((40, 30), (144, 112), (149, 112), (2, 0)),  # enlarged
        ((100, 1000), (64, 256), (64, 640), (0, 192)),  # wider than the widest
        ((1000, 100), (256, 64), (640, 64), (192, 0)),
        ((1, 3000), (64, 256), (64, 192_000), (0, 95_872)),
    ],
)
def test_the_nearest_shape_is_covered_and_the_centre_kept(
    size: tuple[int, int], target: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]
) -> None:
    assert fit_bucket(size, buckets(128)) == ResizedCrop(size, resized, crop, target)


@pytest.mark.parametrize("size", [(100, 1000), (1000, 100), (150, 200), (30, 40), (129, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_numbers_tell_which_pixels_are_left(tmp_path: Path, size: tuple[int, int], turned: bool) -> None:
    upright = gradient(*size)
    stored = upright.transpose(Image.Transpose.ROTATE_90) if turned else upright
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # shown turned to the right by a quarter
    stored.save(tmp_path / "picture.png", exif=exif)
    image, crop = crop_to_bucket(load_image(tmp_path / "picture.png"), buckets(128))
    assert crop.original_size == size
    assert (image.height, image.width) == crop.target_size
    pixels = np.asarray(image).astype(float)
    for axis, channel, line in ((0, 1, pixels[:, image.width // 2]), (1, 0, pixels[image.height // 2])):
        scale = size[axis] / crop.resized[axis]  # pixels of the original for one
        expected = (crop.crop[axis] + np.arange(crop.target_size[axis]) + 0.5) * scale - 0.5
        shown = line[:, channel] / 255 * (size[axis] - 1)
        inside = (expected > 1) & (expected < size[axis] - 2)  # at the edges the filter is cut
        rounding = 0.5 + size[axis] / 255  # of a pixel's position and of its 256 values
        assert np.abs(shown - expected)[inside].max() < rounding
    top, left = crop.crop
    whole = upright.resize(crop.resized[::-1], Image.Resampling.LANCZOS)
    cut = whole.crop((left, top, left + image.width, top + image.height))
    assert np.abs(np.asarray(cut).astype(int) - np.asarray(image)).max() <= 1


SIZES = [(128, 128)] * 12 + [(64, 256)] * 6 + [(256, 64)] * 2
EQUALLY = 0.1  # relative: five standard deviations of 3000 draws of a picture, some of them twice in one batch
SHARE = 0.015  # four standard deviations of the first bucket's share in 20,000 batches


def test_a_draw_is_of_one_bucket_and_its_rows_differ_where_there_are_enough() -> None:
    drawn_sizes = set()
    for seed in range(60):
        rows = draw_batch(SIZES, 4, torch.Generator().manual_seed(seed))
        size = {SIZES[i] for i in rows}
        assert len(rows) == 4
        assert len(size) == 1
        assert len(set(rows)) == 4 or size == {(256, 64)}  # which has two only
        drawn_sizes |= size
    assert drawn_sizes == set(SIZES)


def test_draws_are_a_function_of_the_generator_alone() -> None:
    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [draw_batch(SIZES, 3, generator) for _ in range(20)]

    expected = draws(0)
    torch.manual_seed(5)
    assert draws(0) == expected
    assert draws(1) != expected
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        draw_batch(SIZES, 3, generator)
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    assert [draw_batch(SIZES, 3, resumed) for _ in range(10)] == expected[10:]


def test_every_picture_is_drawn_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = Counter[int]()
    batches = 20_000
    for _ in range(batches):
        counts.update(draw_batch(SIZES, 3, generator))
    expected = 3 * batches / len(SIZES)
    assert all(counts[i] == pytest.approx(expected, rel=EQUALLY) for i in range(len(SIZES)))
    share = sum(counts[i] for i in range(12)) / (3 * batches)
    assert share == pytest.approx(0.6, abs=SHARE)
