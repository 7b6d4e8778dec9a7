"""Readers of the settings that pictures carry: the web UI's form by its definition, sd-parsers, exiftool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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

    with Image.open(path) as image:
        return ParserManager().parse(image)


def exiftool(path: Path) -> dict[str, Any]:
    """What exiftool finds."""
    result = subprocess.run(["exiftool", "-json", str(path)], capture_output=True, text=True, check=True)
    [tags] = json.loads(result.stdout)
    found: dict[str, Any] = tags
    return found
