"""Read the JSON files that lie beside weights."""

import json
import os
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.other_files import by_content
from sdxl_ref.weights.regular import read_text

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """An object from a JSON file. InputError where it is none."""
    if not os.path.lexists(path):
        raise InputError(f"expected a JSON file {path}: there is no such file: complete the folder")
    text = read_text(path, "utf-8-sig")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = by_content(path).replace("expected a safetensors file", "expected JSON")
        raise InputError(f"{path} {'is empty' if not text.strip() else what or no_json(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> Json | None:
    """The same, and None where nothing has this name. InputError for a link to nowhere, also in the folder's place."""
    is_broken = os.path.islink(path.parent) and not os.path.exists(path.parent)
    return read_json(path) if is_broken or os.path.lexists(path) else None


def no_json(error: Exception) -> str:
    """Why a text is no JSON: the message of Python's, without its advice on how to change Python's limits."""
    return f"is no JSON: {str(error).split(';')[0]}: download it again"
