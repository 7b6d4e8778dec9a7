"""The settings that a PNG carries: as JSON, and in the form that common viewers read."""

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from sdxl_ref.pictures.images import parameters, png_chunks

SETTINGS = {
    "prompt": "a café, 北京 🙂\nsecond line",
    "negative_prompt": "blurry",
    "num_inference_steps": 50,
    "sampler": "euler",
    "spacing": "leading",
    "guidance_scale": 5.0,
    "seed": 0,
    "size": "40x24",
    "strength": 0.3,
    "sigmas": [0.5692766904830933, 0.1, 0.0],
    "checkpoint": {"sha256": "0123456789abcdef"},
    "versions": {"sdxl_ref": "0.1.0"},
}


def png(settings: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(stream, "PNG", pnginfo=png_chunks(settings))
    return stream.getvalue()


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    with Image.open(io.BytesIO(png(settings))) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def test_settings_come_back_as_they_were() -> None:
    found = texts(SETTINGS)
    assert json.loads(found["sdxl_ref"]) == SETTINGS
    assert found["parameters"] == (
        "a café, 北京 🙂\nsecond line\nNegative prompt: blurry\nSteps: 50, Sampler: euler, Schedule type: leading, "
        "CFG scale: 5.0, Seed: 0, Size: 40x24, Denoising strength: 0.3, Model hash: 0123456789, "
        "Version: sdxl-ref 0.1.0"
    )


def test_the_parameters_leave_out_what_there_is_not() -> None:
    settings = {"prompt": "a cat", "negative_prompt": "", "seed": None, "versions": {"sdxl_ref": "0.1.0"}}
    assert parameters(settings) == "a cat\nVersion: sdxl-ref 0.1.0"


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800 alone"])
def test_a_prompt_of_broken_bytes_can_be_saved(prompt: str) -> None:
    """A shell hands bytes that are no UTF-8 over as lone surrogates."""
    found = texts(SETTINGS | {"prompt": prompt})
    assert "?" in found["parameters"].splitlines()[0]
    assert json.loads(found["sdxl_ref"])["prompt"] == prompt


def test_the_chunks_are_read_by_the_plain_format() -> None:
    """International text chunks, uncompressed, before the pixels: what viewers look for."""
    names = []
    file = io.BytesIO(png(SETTINGS))
    stream = PngImagePlugin.ChunkStream(file)
    file.seek(8)
    while not names or names[-1] != b"IEND":
        name, position, length = stream.read()
        names.append(name)
        file.seek(position + length + 4)
    assert names[0] == b"IHDR"
    assert names.count(b"iTXt") == 2
    assert max(i for i, name in enumerate(names) if name == b"iTXt") < names.index(b"IDAT")
