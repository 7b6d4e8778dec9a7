"""SDXL's aspect buckets: the sizes of its training pictures, the crop that brings a picture into one, and batches.

Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3, and appendix I (the 40 buckets).
Sizes are (height, width).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from sdxl_ref.config import InputError

Size = tuple[int, int]
TABLE = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344
768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832
1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512
2048x512
"""
TABLE_RESOLUTION = 1024
GRANULARITY = 128  # of a resolution for which every side of every bucket is a multiple of 8


def buckets(resolution: int) -> list[Size]:
    """SDXL's 40 aspect buckets, scaled from 1024 to a model's resolution. InputError unless it is a multiple of 128."""
    if resolution < GRANULARITY or resolution % GRANULARITY:
        raise InputError(
            f"expected a model's resolution, for its buckets a multiple of {GRANULARITY}, found {resolution}"
        )
    sizes = []
    for entry in TABLE.split():
        height, width = (int(side) * resolution // TABLE_RESOLUTION for side in entry.split("x"))
        sizes.append((height, width))
    return sizes


@dataclass(frozen=True)
class ResizedCrop:
    """How a picture comes into its bucket: it is resized until it just covers it, and what protrudes is cut off."""

    original_size: Size  # upright, before it is resized
    resized: Size
    crop: tuple[int, int]  # top, left, in the resized picture
    target_size: Size  # the bucket


def fit_bucket(original_size: Size, sizes: Sequence[Size]) -> ResizedCrop:
    """The crop into the bucket of the nearest aspect ratio (by its logarithm): centred, small pictures enlarged."""
    height, width = original_size
    target_height, target_width = min(sizes, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))
    scale = max(target_height / height, target_width / width)
    resized_height = round(height * scale)
    resized_width = round(width * scale)
    top = (resized_height - target_height) // 2
    left = (resized_width - target_width) // 2
    return ResizedCrop(original_size, (resized_height, resized_width), (top, left), (target_height, target_width))


def crop_to_bucket(image: Image.Image, sizes: Sequence[Size]) -> tuple[Image.Image, ResizedCrop]:
    """An upright picture, as `load_image` returns it -> the picture in its bucket (Lanczos), and how it got there.

    What is cut off is not even resized.
    """
    crop = fit_bucket((image.height, image.width), sizes)
    top, left = crop.crop
    height, width = crop.target_size
    y_scale = image.height / crop.resized[0]  # pixels of the original for one of the resized picture
    x_scale = image.width / crop.resized[1]
    right = min((left + width) * x_scale, image.width)
    bottom = min((top + height) * y_scale, image.height)
    box = (left * x_scale, top * y_scale, right, bottom)
    return image.resize((width, height), Image.Resampling.LANCZOS, box), crop


def draw_batch(picture_buckets: Sequence[Size], batch_size: int, generator: torch.Generator) -> list[int]:
    """The indices of a batch whose pictures share a bucket, drawn on the CPU: first the bucket, then its pictures.

    A bucket is drawn in proportion to its pictures; these are drawn without replacement where there are enough. Only
    the generator decides, so a run can be resumed where it stopped.
    """
    picture = int(torch.randint(len(picture_buckets), (1,), generator=generator))
    members = [i for i, bucket in enumerate(picture_buckets) if bucket == picture_buckets[picture]]
    chosen = torch.randperm(len(members), generator=generator)[:batch_size]  # (batch_size,) or fewer
    if len(members) < batch_size:
        chosen = torch.randint(len(members), (batch_size,), generator=generator)  # (batch_size,)
    return [members[i] for i in chosen.tolist()]
