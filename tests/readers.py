"""Settings that pictures carry, and readers of them: by the web UI's form, sd-parsers, exiftool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.ExifTags import IFD, Base

SETTINGS: dict[str, Any] = {
    "prompt": "a café, 北京 🙂\nsecond line",
    "negative_prompt": "blurry",
    "num_inference_steps": 50,
    "sampler": "dpmpp_2m",
    "spacing": "linspace",
    "karras": True,
    "guidance_scale": 5.0,
    "seed": 0,
    "size": "40x24",
    "strength": 0.3,
    "sigmas": [0.5692766904830933, 0.1, 0.0],
    "checkpoint": {"file": "sd_xl_base_1.0.safetensors", "sha256": "0123456789abcdef"},
    "refiner": "sd_xl_refiner_1.0 [fedcba9876]",
    "refiner_switch": 0.8,
    "lora_hashes": "style: 0123456789ab, light: fedcba987654",
    "versions": {"sdxl_ref": "0.1.0"},
}
PROMPTS = [
    ("a red barn", "blurry"),
    ("a barn, red, in the snow", "blurry, grey, out of focus"),
    ('the word "open", on a door', 'the word "closed"'),
    ("it's 10:30, Steps: many", "a: b, c: d"),
    ("first line\nsecond, line\n\nfourth", "first line\nsecond"),
    ("(barn:1.3), [red|blue], <lora:x:1>, {a}, \\(", "(bad:1.4)"),
    ("a café, 北京 🙂, é", "模糊"),
    ("a barn", ""),
    ("", "blurry"),
]
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # of the web UI's `infotext_utils.py`
needs_exiftool = pytest.mark.skipif(
    shutil.which("exiftool") is None, reason="exiftool is not installed (libimage-exiftool-perl)"
)


def web_ui(text: str) -> dict[str, str]:
    """The form's definition: a prompt, its negative after "Negative prompt:", and a last line of 3 fields or more."""
    *lines, last = text.strip().split("\n")
    pairs = FIELD.findall(last)
    assert len(pairs) >= 3
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    side = "Prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            side = "Negative prompt"
            line = line.removeprefix("Negative prompt:").strip()
        prompts[side].append(line)
    fields = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return {name: "\n".join(lines) for name, lines in prompts.items()} | fields


def sd_parsers(path: Path) -> Any:
    """What sd-parsers finds."""
    from sd_parsers import ParserManager
    from sd_parsers.extractors import _jpeg_usercomment

    _jpeg_usercomment._image_id = (
        None  # it keeps the last comment by the address of its picture, which may be a new one
    )
    with Image.open(path) as image:
        return ParserManager().parse(image)


def exiftool(path: Path) -> dict[str, Any]:
    """What exiftool finds."""
    result = subprocess.run(["exiftool", "-json", str(path)], capture_output=True, text=True, check=True)
    [tags] = json.loads(result.stdout)
    found: dict[str, Any] = tags
    return found


def user_comment(image: Image.Image) -> str:
    """The text of EXIF's user comment, by EXIF 2.3: a code of 8 bytes, then the characters."""
    comment: bytes = image.getexif().get_ifd(IFD.Exif)[Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")
