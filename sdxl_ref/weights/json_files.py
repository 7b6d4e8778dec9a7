"""Read the JSON files that lie beside weights."""

import json
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.regular import check_regular

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """An object from a JSON file. InputError where it is none."""
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON file {path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(value).__name__}")
    return value
