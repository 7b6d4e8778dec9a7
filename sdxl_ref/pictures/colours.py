"""Pictures that are not plain 8-bit RGB: colour profiles, transparency, 16 bits, grey, palettes, CMYK and the rest.

Colours are taken to sRGB by littlecms (Pillow's ImageCms), as browsers do: with the perceptual intent, whose table a
CMYK profile has for this, and no compensation of the black point but that which the profile's version implies. (The
profile of a camera or a screen is a matrix and curves, and gives the same for every intent.) A picture without a
profile is taken as sRGB; a PNG's gAMA, cHRM and cICP chunks and an EXIF colour space are not looked at.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from sdxl_ref.config import InputError

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of the colour space that a profile is for
FRAMED = ("GIF", "PNG", "TIFF", "WEBP", "AVIF")  # a phone's JPEG (MPO) has but previews and depths behind its picture
SCALES = {"L;2": 85, "L;4": 17}  # of grey in 2 and 4 bits: Pillow scales the pixels, and not the transparent level


def to_srgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> upright 8-bit RGB in sRGB: transparency goes over white, 16 bits are divided by 257.

    A warning where there is a colour profile that is damaged, or for another kind of picture: it is left out; and
    where a file holds several pictures, of which this is the first.
    InputError for values whose range is not known.
    """
    name = getattr(image, "filename", "") or "a picture"
    if image.format in FRAMED and getattr(image, "is_animated", False) and image.tell() == 0:
        warnings.warn(f"{name} holds several pictures (an animation, or pages): the first alone is used", stacklevel=2)
    profile = image.info.get("icc_profile")
    transparent = transparent_colour(image)
    image = ImageOps.exif_transpose(image)
    alpha = None
    if image.mode == "F" or image.mode.startswith("I"):
        levels = levels_16(image)
        if transparent is not None:
            alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        if transparent is not None:
            image.info["transparency"] = transparent
        alpha = image.convert("RGBA").getchannel("A")
    rgb = managed(without_alpha(image), profile, name)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def transparent_colour(image: Image.Image) -> Any:
    """The one colour or level that is transparent, on the scale of the pixels; None where there is none.

    A palette has a list (bytes), which needs no scaling. Pillow keeps the upper 8 bits of 16-bit RGB.
    """
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", [])  # how the file stores it, until it is decoded
    stored = tiles[0][3] if tiles else None
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    if isinstance(colour, int) and isinstance(stored, str):
        return colour * SCALES.get(stored, 1)
    if isinstance(colour, tuple) and (stored == "RGB;16B" or max(colour) > 255):
        return tuple(value >> 8 for value in colour)
    return colour


def levels_16(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The levels (h,w) of 16-bit grey. InputError where they are not from 0 to 65535."""
    if image.mode == "F":
        raise InputError("expected a picture of 8 or 16 bits, found floating point, whose range is not known")
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise InputError(f"expected a picture of 8 or 16 bits, found levels from {levels.min()} to {levels.max()}")
    return levels


def without_alpha(image: Image.Image) -> Image.Image:
    """The colours alone, in a mode that a profile may be for: L, RGB, CMYK or LAB."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode == "La":  # premultiplied
        return image.convert("LA").convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def managed(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Colours of L, RGB, CMYK or LAB -> RGB in sRGB, by the profile where there is one that fits."""
    target = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        return transformed(image, ImageCms.createProfile("LAB"), target)
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if (image.mode, space) == ("L", "RGB"):  # grey is a colour of RGB
            image = image.convert("RGB")
        if MODES.get(space) == image.mode:
            return transformed(image, source, target)
        problem = f"is for {space}, and the picture is {image.mode}"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        problem = f"is damaged ({error})"
    warnings.warn(f"the colour profile of {name} {problem}: it is left out, the colours may be off", stacklevel=2)
    return image.convert("RGB")


def transformed(image: Image.Image, source: Any, target: Any) -> Image.Image:
    """The picture in the colours of another profile, as RGB."""
    result = ImageCms.profileToProfile(image, source, target, ImageCms.Intent.PERCEPTUAL, outputMode="RGB")
    assert result is not None  # it is where the picture itself is changed
    return result
