"""A folder of captioned pictures: lines in a `metadata.jsonl`, or a text file beside each picture.

The first is the convention of the datasets library's `imagefolder`; the second that of kohya's tools.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.training.caption_files import CAPTIONS, has_captions, read_captions
from sdxl_ref.training.examples import PICTURES, Example, Examples, counted, files_in, is_picture
from sdxl_ref.weights.regular import check_regular, read_text

METADATA = "metadata.jsonl"
SAMPLE_LINE = '{"file_name": "cup.png", "text": "a cup of coffee"}'
SCORE_LIMIT = 1e9
COLUMNS = ("file_name", "text", "aesthetic_score")
OTHER_NAMES = {  # of columns, in other tools' tables
    "file_name": ("filename", "file", "file_path", "filepath", "image", "image_path", "image_file", "img", "path"),
    "text": ("caption", "prompt", "captions", "description", "txt", "label", "tags"),
}
TABLES = (".csv", ".tsv", ".json", ".parquet", ".xlsx")
FROM_CSV = (  # as Excel writes it too: with a mark at the beginning, semicolons, decimal commas
    "python3 -c 'import csv, io, json, sys; "
    'text = sys.stdin.buffer.read().decode("utf-8-sig"); '
    'separator = max(",;\\t", key=text.split("\\n")[0].count); '
    "rows = csv.DictReader(io.StringIO(text), delimiter=separator); "
    'number = lambda cell: float(cell.replace(",", ".")) if cell else None; '
    '[print(json.dumps({name: number(cell) if name == "aesthetic_score" else cell for name, cell in row.items()}))'
    " for row in rows]'"
)


def read_folder(folder: Path) -> Examples:
    """The examples of a folder: the lines of its `metadata.jsonl` in their order, or else pictures with caption files.

    A line has `file_name` (relative to the folder), `text`, and optionally `aesthetic_score`; a picture may have
    several, each with its caption. Notes say what of the folder is not used. InputError names a line that is not like
    this, or whose picture does not exist, and says what to do where there are no captions.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder of pictures: {folder}")
    files = files_in(folder)
    path = folder / METADATA
    check_regular(path)
    if not path.is_file():
        if has_captions(files):
            found = read_captions(folder, files)
            return Examples(found.examples, found.files, found.notes + notes_on_tables(folder, files))
        raise InputError(no_captions(folder, files))
    examples = []
    columns: Counter[str] = Counter()
    for number, line in enumerate(read_text(path, "utf-8-sig").split("\n"), 1):  # a caption may hold U+2028
        if line.strip():
            location = f"{path}, line {number}"
            fields = parse_object(line, location)
            columns.update(fields.keys() - COLUMNS)
            examples.append(read_line(folder, fields, location))
    if not examples:
        raise InputError(f"{path} is empty: write a line for each picture, as {SAMPLE_LINE}")
    return Examples(examples, [path], notes_on(folder, files, examples, sorted(columns)))


def no_captions(folder: Path, files: Sequence[Path]) -> str:
    """Why a folder is none of captioned pictures, and what to do."""
    problem = f"expected {METADATA} in {folder}, or a caption file beside each picture, found neither"
    own = [path.name for path in files if path.parent == folder]
    tables = [name for name in own if name.lower().endswith(TABLES)]
    below = [path for path in files if path.name == METADATA]
    if lines := [name for name in own if ".jsonl" in name.lower()]:
        return f"{problem}, but {lines[0]}: rename it to {METADATA}"
    if tables and tables[0].lower().endswith(".csv"):
        command = f"{FROM_CSV} < {quote(str(folder / tables[0]))} > {quote(str(folder / METADATA))}"
        return f"{problem}, but {tables[0]}: with its columns named file_name and text, {command}"
    if tables:
        return f"{problem}, but {tables[0]}: write what it says as lines such as {SAMPLE_LINE}"
    if below:
        return f"{problem}, but {below[0]}: name its folder"
    if not any(map(is_picture, files)):
        return f"expected pictures in {folder}, found none ({', '.join(PICTURES)}): name the folder that holds them"
    return f"{problem}: write a line for each picture, as {SAMPLE_LINE}"


def notes_on(folder: Path, files: Sequence[Path], examples: Sequence[Example], columns: Sequence[str]) -> list[str]:
    """A line for each kind of thing in a folder, or in its lines, that is not used."""
    notes = []
    used = {os.path.realpath(example.path) for example in examples}
    if unnamed := [path for path in files if is_picture(path) and os.path.realpath(path) not in used]:
        notes.append(f"left out: {counted(unnamed, folder, 'picture')} without a line in {METADATA}")
    if columns:
        notes.append(f"not used: the columns {', '.join(columns)} of {METADATA}")
    stems = {example.path.with_suffix("") for example in examples}
    if captions := [path for path in files if path.suffix in CAPTIONS and path.with_suffix("") in stems]:
        notes.append(f"not read: {counted(captions, folder, 'caption file')}, because there is a {METADATA}")
    return notes + notes_on_tables(folder, files)


def notes_on_tables(folder: Path, files: Sequence[Path]) -> list[str]:
    """A line for the tables of pictures that are not read: of folders below, and in another form."""
    path = folder / METADATA
    others = [file for file in files if file.stem == path.stem and file.suffix in (".jsonl", ".csv") and file != path]
    if not others:
        return []
    return [f"not read: {counted(others, folder, 'other table')}; of {folder} only {METADATA} itself is"]


def read_line(folder: Path, fields: dict[str, Any], location: str) -> Example:
    """An example from the fields of a line. InputError begins with its `location`."""
    for name in ("file_name", "text"):
        is_text = isinstance(fields.get(name), str)
        if not is_text or (name == "file_name" and not fields[name]):
            remedy = renaming(name, fields) or f"write it as in {SAMPLE_LINE}"
            raise InputError(f"{location}: expected {name}, a text, found {fields.get(name)!r}: {remedy}")
    path = find_picture(folder, fields["file_name"], location)
    return Example(path, fields["text"], read_score(fields.get("aesthetic_score"), location))


def renaming(name: str, fields: dict[str, Any]) -> str:
    """What to do where a column seems to be there under another name; empty where none does."""
    for other in fields:
        plain = other.lower().replace("-", "_").replace(" ", "_")
        if name not in fields and (plain in OTHER_NAMES[name] or plain == name):
            return f"rename the column {other!r} to {name!r} in every line"
    return ""


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
    check_regular(path)
    if not os.path.isfile(path):
        remedy = ""
        if "\\" in file_name:
            remedy = ": write it with forward slashes, relative to the folder, as 'more/cup.png'"
        raise InputError(f"{location}: no such picture in {folder}: {file_name!r}{remedy}")
    return path


def read_score(score: object, location: str) -> float | None:
    """An aesthetic score, if there is one. InputError for what is no finite number."""
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < SCORE_LIMIT:
        problem = f"{location}: expected a finite number as aesthetic_score, found {score!r}"
        raise InputError(f"{problem}: write it without quotes, or leave it out")
    return float(score)
