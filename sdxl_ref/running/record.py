"""What a batch has done: a line of JSON for each job, added to a file that is never rewritten.

A line is written in one piece when its pictures are on the disk, so that a kill at any moment loses at most the job at
work. What was cut off in the middle of a line is passed over. Processes that share a folder (ranks, shards) have a
file each, `record.jsonl` or `record-NAME.jsonl`, and read all of them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.regular import check_regular

FORMAT = 1
FILES = "record*.jsonl"


class Record:
    """The record of an output folder, open to be added to. `settings` hold for all of its jobs: InputError for others.

    `done` has the pictures of each finished job, by the job's name.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str = "") -> None:
        self.folder = folder
        self.path = folder / (f"record-{name}.jsonl" if name else "record.jsonl")
        self.done: dict[str, list[str]] = {}
        self.weights: dict[str, str] = {}  # sha256 by the name that the options give
        is_begun = False
        for path, entry in entries(folder):
            is_begun = is_begun or (path == self.path and "format" in entry)
            self.take(entry, settings)
        check_regular(self.path)
        try:
            is_cut = self.path.exists() and not ends_well(self.path)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error.strerror}") from error
        if is_cut:
            self.write(b"\n")
        if not is_begun:
            self.add({"format": FORMAT, **settings})

    def take(self, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Read an entry of an earlier process. InputError for one that worked in another way."""
        if "format" in entry:
            for name, value in {"format": FORMAT, **settings}.items():
                if entry.get(name) != value:
                    raise InputError(
                        f"{self.folder} holds a batch with another {name} ({entry.get(name)}), expected {value}: go on "
                        "with the same, or use another folder"
                    )
        if isinstance(entry.get("pictures"), list):
            self.done[str(entry.get("job"))] = [str(name) for name in entry["pictures"]]
        self.weights.update(entry.get("weights") or {})

    def is_done(self, job: str, files: Mapping[str, Any] | set[str]) -> bool:
        """Whether a job is finished, and its pictures are still among these files."""
        return job in self.done and all(name in files for name in self.done[job])

    def finish(self, job: str, pictures: Sequence[str], options: Mapping[str, Any]) -> None:
        """Note that a job's pictures are there."""
        self.add({"job": job, "pictures": list(pictures), "options": dict(options)})
        self.done[job] = list(pictures)

    def check_weights(self, digests: Mapping[str, str]) -> None:
        """Note the weights that the next jobs use. InputError where others had the same name."""
        for name, digest in digests.items():
            if self.weights.get(name, digest) != digest:
                raise InputError(
                    f"{name} is not the file that this batch began with (sha256 {digest[:12]}, expected "
                    f"{self.weights[name][:12]}): use another folder, or that file"
                )
        if digests.items() - self.weights.items():
            self.weights.update(digests)
            self.add({"weights": dict(digests)})

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a line, and have it on the disk. InputError where the system cannot."""
        self.write(json.dumps(entry).encode() + b"\n")

    def write(self, line: bytes) -> None:
        try:
            if os.write(self.file, line) != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self.file)
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self.file)


def entries(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All entries of a folder's records, each file's in its order; lines that are none are passed over."""
    for path in sorted(folder.glob(FILES)):
        check_regular(path)
        try:
            with path.open("rb") as file:
                yield from ((path, entry) for entry in map(read_entry, file) if entry is not None)
        except OSError as error:
            raise InputError(f"could not read {path}: {error.strerror}") from error


def read_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def ends_well(path: Path) -> bool:
    """Whether the last line is whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"\n", b"")
