"""JPEG, WebP and TIFF with the settings in EXIF: read back by EXIF's definition, by sd-parsers and by exiftool."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
from PIL import Image
from PIL.ExifTags import Base
from readers import PROMPTS, SETTINGS

from sdxl_ref.commands.common import SUFFIXES, save_picture
from sdxl_ref.pictures import formats
from sdxl_ref.pictures.settings import parameters

GRADIENTS = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 192, 4)), axis=2)  # (48,64,2)
PICTURE = Image.fromarray(np.dstack([GRADIENTS, 255 - GRADIENTS[..., :1]]).astype(np.uint8))
KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".JPG": "JPEG"}
EXIF_FORMATS = [".jpg", ".webp", ".tiff"]


def write(path: Path, **changes: Any) -> dict[str, Any]:
    settings = SETTINGS | changes
    save_picture(PICTURE, path, settings)
    return settings


def exif(path: Path) -> tuple[dict[int, Any], str]:
    """The tags of a picture, and the user's comment."""
    with Image.open(path) as image:
        return dict(image.getexif()), readers.user_comment(image)


def test_every_suffix_that_is_accepted_can_be_written() -> None:
    assert set(formats.OPTIONS) | {".png"} == set(SUFFIXES)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_picture_is_of_the_format_that_its_name_says(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert (image.format, image.mode, image.size) == (KINDS[suffix], "RGB", PICTURE.size)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(PICTURE))
    assert difference.max() <= (4 if KINDS[suffix] == "JPEG" else 0)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", EXIF_FORMATS)
@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_the_settings_are_read_by_the_definition(suffix: str, prompt: str, negative: str, tmp_path: Path) -> None:
    settings = write(tmp_path / f"a{suffix}", prompt=prompt, negative_prompt=negative)
    tags, comment = exif(tmp_path / f"a{suffix}")
    assert comment == parameters(settings)
    assert json.loads(tags[Base.ImageDescription]) == settings
    assert tags[Base.Software] == "sdxl-ref 0.1.0"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_sd_parsers_reads_them(suffix: str, prompt: str, negative: str, tmp_path: Path) -> None:
    write(tmp_path / f"a{suffix}", prompt=prompt, negative_prompt=negative)
    found = readers.sd_parsers(tmp_path / f"a{suffix}")
    [sampler] = found.samplers
    assert [prompt.value for prompt in sampler.prompts] == ([prompt] if prompt else [])
    assert [prompt.value for prompt in sampler.negative_prompts] == ([negative] if negative else [])
    assert (sampler.name, sampler.parameters["scheduler"]) == ("DPM++ 2M", "Karras")
    assert found.metadata["Refiner switch at"] == "0.8"


@readers.needs_exiftool
@pytest.mark.parametrize("suffix", EXIF_FORMATS)
@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_exiftool_reads_them(suffix: str, prompt: str, negative: str, tmp_path: Path) -> None:
    settings = write(tmp_path / f"a{suffix}", prompt=prompt, negative_prompt=negative)
    found = readers.exiftool(tmp_path / f"a{suffix}")
    assert found["UserComment"].strip() == parameters(settings).strip()
    assert json.loads(found["ImageDescription"]) == settings


def test_a_prompt_of_broken_bytes_can_be_saved(tmp_path: Path) -> None:
    settings = write(tmp_path / "a.jpg", prompt="caf\udce9")
    tags, comment = exif(tmp_path / "a.jpg")
    assert comment.startswith("caf?\n")
    assert json.loads(tags[Base.ImageDescription]) == settings


def segments(path: Path) -> dict[bytes, int]:
    """The lengths of a JPEG's segments before the pixels."""
    data = path.read_bytes()
    lengths = {}
    i = 2
    while data[i + 1] != 0xDA:
        lengths[data[i : i + 2]] = struct.unpack(">H", data[i + 2 : i + 4])[0]
        i += 2 + lengths[data[i : i + 2]]
    return lengths


def test_a_jpeg_has_room_for_64_kilobytes_of_settings(tmp_path: Path) -> None:
    """Where they do not fit the levels are left out, and then all, and a warning says so; other formats have room."""
    levels = {"sigmas": [0.123456789] * 5000}
    with pytest.warns(UserWarning, match="too long for a JPEG: written without their levels"):
        settings = write(tmp_path / "a.jpg", **levels)
    tags, comment = exif(tmp_path / "a.jpg")
    assert comment == parameters(settings)
    assert json.loads(tags[Base.ImageDescription]) == {key: settings[key] for key in settings if key != "sigmas"}
    with pytest.warns(UserWarning, match="too long for a JPEG: written without them"):
        write(tmp_path / "b.jpg", prompt="very " * 20_000)
    with Image.open(tmp_path / "b.jpg") as image:
        assert not image.getexif()
    for suffix in (".webp", ".tiff"):
        settings = write(tmp_path / f"c{suffix}", prompt="very " * 20_000, **levels)
        tags, comment = exif(tmp_path / f"c{suffix}")
        assert json.loads(tags[Base.ImageDescription]) == settings
        assert comment == parameters(settings)


def test_the_limit_of_a_jpeg_is_that_of_its_segment(tmp_path: Path) -> None:
    """By bisection to the last letter that fits without a warning."""
    write(tmp_path / "a.jpg")
    room = formats.MOST_BYTES - len(formats.exif(SETTINGS | {"prompt": ""}))
    fits = room // 3  # a letter stands twice: one byte in JSON, two in UTF-16
    write(tmp_path / "a.jpg", prompt="x" * fits)
    assert 65_500 < segments(tmp_path / "a.jpg")[b"\xff\xe1"] <= 65_535
    with pytest.warns(UserWarning, match="written without their levels"):
        write(tmp_path / "a.jpg", prompt="x" * (fits + 3))
