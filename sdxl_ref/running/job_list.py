"""The list of a batch: JSON lines, a table (CSV, TSV), a folder of pictures, or a tar of them.

What is wrong with a line is kept beside the others.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sdxl_ref.config import InputError
from sdxl_ref.training.examples import PICTURES, is_hidden, is_picture
from sdxl_ref.weights.regular import check_regular

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SAMPLE = '{"prompt": "a red barn", "seed": 1}'


class Line(NamedTuple):
    """A line: its number in the file, counted from 1, and its options as they stand there, or what is wrong with it."""

    number: int
    options: dict[str, Any]
    error: str = ""


def bad(number: int, reason: str) -> Line:
    """A line that is no job, with what is wrong with it in one printable line."""
    return Line(number, {}, str(InputError(reason)))


def read(source: Path) -> Iterator[Line]:
    """The lines of a file, by its suffix a table, a tar or else JSON lines, or the pictures of a folder in order.

    Empty lines are left out, and so is an empty cell of a table. InputError where there is no such file or folder, and
    for a table without a first line that names its columns.
    """
    check_regular(source)
    if source.is_dir():
        yield from pictures(source)
        return
    if source.suffix.lower() == ".tar":
        yield from in_tar(source)
        return
    try:
        with source.open("rb") as file:
            separator = SEPARATORS.get(source.suffix.lower())
            yield from json_lines(file) if separator is None else table(file, source, separator)
    except OSError as error:
        raise InputError(f"could not read the job list {source}: {error.strerror}") from error


def pictures(folder: Path) -> Iterator[Line]:
    """Those that lie in a folder itself."""
    paths = [folder / name for name in sorted(os.listdir(folder)) if not is_hidden(name)]
    paths = [path for path in paths if is_picture(path)]
    if not paths:
        raise InputError(f"no picture lies in {folder}: expected files that end in {', '.join(PICTURES)}")
    yield from (Line(number, {"image": str(path)}) for number, path in enumerate(paths, 1))


def in_tar(source: Path) -> Iterator[Line]:
    """Its jobs, numbered from 1. The one place that imports what reads a tar."""
    from sdxl_ref.running import tar_shards

    for number, sample in enumerate(tar_shards.samples(source), 1):
        options: dict[str, Any] = {}
        try:
            if "json" in sample:
                options |= json_object(sample["json"].decode())
            if "txt" in sample:
                options["prompt"] = sample["txt"].decode().strip()
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, f"{sample['__key__']}: {error}, as {SAMPLE}")
            continue
        image = tar_shards.picture_of(source, sample)
        yield Line(number, options if image is None else {**options, "image": image})


def json_lines(file: Any) -> Iterator[Line]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            try:
                yield Line(number, json_object(line.decode()))
            except (ValueError, RecursionError) as error:
                reason = str(error) if str(error).startswith("expected") else f"expected a JSON object ({error})"
                yield bad(number, f"{reason}, as {SAMPLE}")


def json_object(text: str) -> dict[str, Any]:
    """ValueError for anything but an object with each name once and finite numbers."""
    value = json.loads(text, object_pairs_hook=without_twins, parse_constant=refuse_constant)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text.strip()[:60]!r}")
    return value


def without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in options:
            raise ValueError(f"expected each option once, found {name!r} twice")
        options[name] = value
    return options


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, found {name}")


def table(file: Any, source: Path, separator: str) -> Iterator[Line]:
    """The rows under a line that names the columns. A row may end early, and go on over lines where it is quoted."""
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in file), delimiter=separator, strict=True)
    columns: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield bad(number, f'expected cells separated by {separator!r}, quoted by " where need be ({error})')
            continue
        if columns:
            yield from row_of(number, columns, row)
        elif row:
            columns = names_of_columns(row, source)


def row_of(number: int, columns: Sequence[str], row: Sequence[str]) -> Iterator[Line]:
    cells = [cell.strip() for cell in row]
    if not any(cells):
        return
    if len(cells) > len(columns):
        yield bad(number, f"expected {len(columns)} cells as in the first line, found {len(cells)}")
    elif any(not cell.isprintable() and "\udc80" <= max(cell) <= "\udcff" for cell in cells if cell):
        yield bad(number, "expected UTF-8, found other bytes: save the table as UTF-8")
    else:
        yield Line(number, {name: cell for name, cell in zip(columns, cells, strict=False) if cell})


def names_of_columns(row: Sequence[str], source: Path) -> list[str]:
    names = [name.strip().removeprefix("\ufeff") for name in row]
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"{source}: expected a first line that names each column once, found {','.join(row)[:100]!r}")
    return names
