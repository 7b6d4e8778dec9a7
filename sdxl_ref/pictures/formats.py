"""Pictures as JPEG, WebP and TIFF, with their settings in EXIF: imported where such a file is asked for.

`UserComment` holds the form of the AUTOMATIC1111 web UI as its readers expect it (EXIF 2.3, 4.6.5: the code "UNICODE",
then UTF-16, big-endian, as the web UI writes it), `ImageDescription` the JSON, `Software` who wrote it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base

from sdxl_ref.pictures.settings import texts

OPTIONS: dict[str, dict[str, Any]] = {  # of Pillow. No pixel is changed but by JPEG; a packed TIFF would lose its EXIF
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".tif": {"format": "TIFF", "compression": "raw"},
    ".tiff": {"format": "TIFF", "compression": "raw"},
}
MOST_BYTES = 65_533  # of EXIF in a JPEG: the length of a segment is a number of 16 bits


def save(image: Image.Image, file: Path, suffix: str, settings: Mapping[str, Any]) -> None:
    """Write a picture in the format of this suffix, a key of `OPTIONS`, whatever the name of the file.

    A warning where settings do not fit into a JPEG: then the levels are left out, or all.
    """
    options = OPTIONS[suffix]
    tags = exif(settings)
    if options["format"] == "JPEG" and len(tags) > MOST_BYTES:
        short = exif({name: value for name, value in settings.items() if name not in ("sigmas", "timesteps")})
        fits = len(short) <= MOST_BYTES
        tags = short if fits else Image.Exif().tobytes()
        what = "their levels" if fits else "them"
        warnings.warn(f"the settings are too long for a JPEG: written without {what}; a .png has room", stacklevel=2)
    image.save(file, exif=tags, **options)


def exif(settings: Mapping[str, Any]) -> bytes:
    """The settings as tags."""
    info = texts(settings)
    tags = Image.Exif()
    tags[Base.ImageDescription] = info["sdxl_ref"]  # JSON is ASCII, as the tag has to be
    tags[Base.Software] = f"sdxl-ref {settings['versions']['sdxl_ref']}"
    tags.get_ifd(IFD.Exif)[Base.UserComment] = b"UNICODE\0" + info["parameters"].encode("utf-16-be")
    return tags.tobytes()
