"""A folder of captioned pictures with a `metadata.jsonl`: the convention of the datasets library's `imagefolder`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError

METADATA = "metadata.jsonl"
SAMPLE_LINE = '{"file_name": "cup.png", "text": "a cup of coffee"}'
SCORE_LIMIT = 1e9


@dataclass(frozen=True)
class Example:
    """A line of `metadata.jsonl`."""

    path: Path
    text: str
    aesthetic_score: float | None = None


def read_folder(folder: Path) -> list[Example]:
    """The lines of a folder's `metadata.jsonl`, in their order. A picture may have several, each with its caption.

    A line has `file_name` (relative to the folder), `text`, and optionally `aesthetic_score`. InputError names a line
    that is not like this, or whose picture does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder of pictures: {folder}")
    path = folder / METADATA
    if not path.is_file():
        raise InputError(
            f"expected {METADATA} in {folder}, found none: write a line for each picture, as {SAMPLE_LINE}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a caption may hold U+2028
    except (OSError, ValueError) as error:
        raise InputError(f"could not read {path} as UTF-8 text: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples.append(read_line(folder, line, f"{path}, line {number}"))
    if not examples:
        raise InputError(f"{path} is empty: write a line for each picture, as {SAMPLE_LINE}")
    return examples


def read_line(folder: Path, line: str, location: str) -> Example:
    """One line of a folder's metadata. InputError begins with its `location`."""
    fields = parse_object(line, location)
    for name in ("file_name", "text"):
        is_text = isinstance(fields.get(name), str)
        if not is_text or (name == "file_name" and not fields[name]):
            raise InputError(
                f"{location}: expected {name}, a text, found {fields.get(name)!r}: write it as in {SAMPLE_LINE}"
            )
    path = find_picture(folder, fields["file_name"], location)
    return Example(path, fields["text"], read_score(fields.get("aesthetic_score"), location))


def parse_object(line: str, location: str) -> dict[str, Any]:
    """The JSON object in a line. InputError where there is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f"{location}: expected JSON as {SAMPLE_LINE}, found {line.strip()[:60]!r}")
    return fields


def find_picture(folder: Path, file_name: str, location: str) -> Path:
    """The path of a picture. InputError where it is outside the folder or does not exist."""
    first_component = os.path.normpath(file_name).split(os.sep)[0]
    if os.path.isabs(file_name) or first_component == os.pardir:
        raise InputError(
            f"{location}: expected a file_name inside {folder}, found {file_name!r}: move the picture there"
        )
    path = folder / file_name
    if not os.path.isfile(path):
        raise InputError(f"{location}: no such picture in {folder}: {file_name!r}")
    return path


def read_score(score: object, location: str) -> float | None:
    """An aesthetic score, if there is one. InputError for what is no finite number."""
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < SCORE_LIMIT:
        raise InputError(
            f"{location}: expected a finite number as aesthetic_score, found {score!r}: correct it or leave it out"
        )
    return float(score)
