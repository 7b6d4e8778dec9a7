"""The invisible watermark that Stability's code puts into pictures: 48 bits in the frequencies of the brightness.

By the package invisible-watermark (extra `watermark`), method dwtDct, whose own decoder reads it back. Off unless
asked for. At SDXL's 1024 pixels all 48 bits read back from a photo; from 512 pixels a few may not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sdxl_ref.config import InputError

MESSAGE = 0b101100111110110010010000011110111011000110011110  # of the official code's `WatermarkEmbedder`
BITS = [int(bit) for bit in f"{MESSAGE:048b}"]
METHOD = "dwtDct"
SMALLEST = 256 * 256  # pixels that the method needs


def package() -> Any:
    """InputError that says how to install it where it is not there."""
    try:
        import imwatermark
    except ImportError as error:
        raise InputError("a watermark needs invisible-watermark: pip install 'sdxl-ref[watermark]'") from error
    return imwatermark


def check(width: int, height: int) -> None:
    """InputError where a picture has fewer than 256x256 pixels, or the package is not there."""
    if width * height < SMALLEST:
        raise InputError(f"a watermark needs a picture of 256x256 pixels or more, found {width}x{height}")
    package()


def embed(image: Image.Image) -> Image.Image:
    """The picture with the 48 bits in it. InputError as `check` raises it."""
    check(*image.size)
    encoder = package().WatermarkEncoder()
    encoder.set_watermark("bits", BITS)
    marked = encoder.encode(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), METHOD)  # works on b, g, r
    return Image.fromarray(np.ascontiguousarray(marked[:, :, ::-1]))


def read(image: Image.Image) -> list[int]:
    """The 48 bits that the package's decoder finds."""
    decoder = package().WatermarkDecoder("bits", len(BITS))
    bits = decoder.decode(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), METHOD)
    return [int(bit) for bit in bits]
