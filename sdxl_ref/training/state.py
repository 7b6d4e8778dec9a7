"""The folder of a run: the lock on it, the state that a run resumes from, and the log."""

import csv
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights import locking
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.regular import check_regular
from sdxl_ref.weights.saving import replacing
from sdxl_ref.weights.tensor_files import read_metadata

STATE = "state.safetensors"
SHARDS = "state.sharded"  # a folder, of a run in which each process keeps a shard: see `sharded.py`
SHARDS_FACTS = "run.json"  # in it: what the metadata of the file STATE say, and the names of its files
LOG = "log.csv"
COLUMNS = ["step", "loss", "gradient_norm", "learning_rate", "seconds"]


def locked(folder: Path) -> AbstractContextManager[None]:
    """Nobody else works in a folder meanwhile; InputError where a run does. The lock ends with the process."""
    return locking.locked(folder, f"another run is at work in {folder}: wait for its end, or use another folder")


def check_same(folder: Path, identity: Mapping[str, object], partly: bool = False, name: str = STATE) -> dict[str, Any]:
    """What the state in a folder says of itself, empty if there is no state; InputError where it is of another run.

    `partly`: only the keys of `identity` are compared, because more of it is not known yet. `name` is STATE or SHARDS.
    """
    other = STATE if name == SHARDS else SHARDS
    if (folder / other).exists():
        how = "without" if name == SHARDS else "with"
        raise InputError(f"{folder} holds a run {how} --sharded: go on with the same, or use another folder")
    path = folder / name
    if not path.exists():
        return {}
    check_regular(path)
    try:
        metadata = read_json(path / SHARDS_FACTS) if name == SHARDS else read_metadata(path)
        saved = dict(json.loads(metadata["identity"]))
        int(metadata["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    current = json.loads(json.dumps(identity))
    keys = current if partly else current | saved
    for key in keys:
        if saved.get(key) != current.get(key):
            name, saved_value, current_value = first_difference(key, saved.get(key), current.get(key))
            remedy = "go on with the same, or use another folder"
            raise InputError(
                f"{folder} holds a run with another {name} ({saved_value}), expected {current_value}: {remedy}"
            )
    return metadata


def damaged(path: Path, reason: object) -> InputError:
    """That a state cannot be read."""
    remedy = "delete it to start over, or use another folder"
    return InputError(f"{path} is no state of a run, or a damaged one ({reason}): {remedy}")


def first_difference(name: str, saved: Any, current: Any) -> tuple[str, Any, Any]:
    """The name and the two values of what differs: of the first entry, where both values are mappings."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in current:
            if saved.get(key) != current[key]:
                return f"{name}: {key}", saved.get(key), current[key]
    return name, saved, current


def truncate_log(folder: Path, step: int) -> None:
    """Keep the log's rows up to the step of the state: later ones are computed again. InputError as of `read_log`."""
    path = folder / LOG
    rows = read_log(folder)
    done = [row for row in rows if row and step_of(row) <= step]
    if read_rows(path) != [COLUMNS, *done]:
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *done])


def read_log(folder: Path) -> list[list[str]]:
    """The rows of a run's log below its first one, none if there is no log. InputError for another table."""
    path = folder / LOG
    rows = read_rows(path)
    if rows and rows[0] != COLUMNS:
        expected = f"expected a log of a run, whose first line is {','.join(COLUMNS)}"
        raise InputError(f"{expected}, found {','.join(rows[0])[:60]!r} in {path}: move it, or use another folder")
    return rows[1:]


def step_of(row: list[str]) -> float:
    """The step of a row; of a damaged one infinity."""
    return int(row[0]) if row[0].isdecimal() and len(row[0]) < 20 else math.inf


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a table, none if there is no file. InputError where it cannot be read."""
    if not path.exists():
        return []
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return list(csv.reader(text.splitlines()))
    except (OSError, csv.Error) as error:
        raise InputError(f"could not read the log of the run, {path} ({error}): move it away") from error
