"""Pictures in and out: PIL <-> tensor, and one rule for sizes."""

import math
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdxl_ref.config import InputError

MULTIPLE = 8  # the VAE's downsampling: sides of a picture are multiples of it


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Open a path, an http(s) address or a PIL picture as RGB: upright (EXIF orientation applied), colours in sRGB.

    What is not plain 8-bit RGB: see `colours.to_srgb`. InputError where there is no such file, or where it is no
    picture, has more pixels than Pillow's limit (found out before they are decoded) or cannot be read.
    """
    name = source if isinstance(source, Image.Image) else os.fspath(source)
    try:
        if isinstance(name, Image.Image):
            return to_rgb(name)
        with Image.open(opened(name)) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"no such picture: {name}") from error
    except Exception as error:  # Pillow's decoders and urllib raise of many kinds on damaged data
        reason = str(error).replace("\n", " ") or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason += "; shrink it first, or, if you trust it, set PIL.Image.MAX_IMAGE_PIXELS = None in Python"
        raise InputError(f"expected a picture (PNG, JPEG, WebP, …), could not read {name}: {reason}") from error


def opened(name: str) -> Any:
    """What Pillow is to open: a file's name, or what an address answers. InputError for a pipe, a device or a folder.

    The one place that imports fetching.
    """
    if name.startswith(("http://", "https://")):
        from sdxl_ref.pictures.address import fetch

        return fetch(name)
    if os.path.exists(name) and not os.path.isfile(name):
        raise InputError("a folder, a pipe or a device is no picture: give a file")
    return name


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture -> upright 8-bit RGB in sRGB. The one place that imports what other kinds than RGB need."""
    marks = (image.has_transparency_data, image.info.get("icc_profile"), getattr(image, "is_animated", False))
    if image.mode != "RGB" or any(marks):
        from sdxl_ref.pictures.colours import to_srgb

        image = to_srgb(image)
    return Image.fromarray(np.array(ImageOps.exif_transpose(image)))  # leaves behind an EXIF that may be damaged


def fit(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The size rule: shrink (Lanczos) to at most `max_pixels`, then crop the centre to sides that are multiples of 8.

    Never enlarges. InputError where a side is left with fewer than 8 pixels.
    """
    original = f"{image.width}x{image.height}"
    if max_pixels is not None and image.width * image.height > max_pixels:
        width = max(1, math.isqrt(max_pixels * image.width // image.height))
        height = max(1, math.isqrt(max_pixels * image.height // image.width))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if min(image.size) < MULTIPLE:
        raise InputError(f"expected a picture of at least {MULTIPLE}x{MULTIPLE} pixels, found {original}")
    width = image.width - image.width % MULTIPLE
    height = image.height - image.height % MULTIPLE
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (1,3,H,W) float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]  # (h,w,3) -> (1,3,h,w)
    return 2.0 * (values.float() / 255.0) - 1.0


def from_tensor(images: Tensor) -> list[Image.Image]:
    """(b,3,H,W) in [0, 1] -> RGB pictures, rounded to the nearest of 256 levels."""
    values = (images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).numpy()]  # (b,3,h,w) -> (b,h,w,3)
