"""What a batch has done: a line of JSON for each job, added to a file that is never rewritten.

A line is written in one piece when its pictures are on the disk, so that a kill at any moment loses at most the job at
work. What was cut off in the middle of a line is passed over. Processes that share a folder (ranks, shards, actors)
have a file each, `record.jsonl` or `record-NAME.jsonl`, and read all of them.
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
    """The record of an output folder: what all processes have written there, and a file of one's own to add to.

    `done` has the pictures of each finished job by the job's name, `failed` why another one could not be done.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self.path = folder / (f"record-{name}.jsonl" if name else "record.jsonl")
        self.settings: dict[str, Any] = {}  # of all jobs
        self.done: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}
        self.weights: dict[str, str] = {}  # sha256 by the name that the options give
        self.ends: dict[Path, int] = {}  # how far each file has been read
        self.file: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what has been added, by others too, since it was read last."""
        for path in sorted(self.folder.glob(FILES)):
            for entry in self.added(path):
                self.take(entry)

    def added(self, path: Path) -> Iterator[dict[str, Any]]:
        """New entries of a file. A line that is not whole yet is left for the next time."""
        check_regular(path)
        end = self.ends.get(path, 0)
        try:
            if path.stat().st_size == end:
                return
            with path.open("rb") as file:
                file.seek(end)
                lines = [line for line in file if line.endswith(b"\n")]
        except OSError as error:
            raise InputError(f"could not read {path}: {error.strerror}") from error
        self.ends[path] = end + sum(map(len, lines))
        yield from (entry for entry in map(read_entry, lines) if entry is not None)

    def take(self, entry: Mapping[str, Any]) -> None:
        job = str(entry.get("job"))
        if "format" in entry:
            if entry["format"] != FORMAT:
                raise InputError(f"{self.folder} holds a batch of another version of this package: use another folder")
            self.settings = self.settings or {name: value for name, value in entry.items() if name != "format"}
        elif isinstance(entry.get("pictures"), list):
            self.done[job] = [str(name) for name in entry["pictures"]]
            self.failed.pop(job, None)
        elif "error" in entry:
            self.failed[job] = str(entry["error"])
        elif isinstance(entry.get("weights"), dict):
            self.weights.update(entry["weights"])

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open a file of one's own, for jobs that are all done with these settings. InputError where others began."""
        for name, value in settings.items():
            if self.settings.get(name, value) != value:
                raise InputError(
                    f"{self.folder} holds a batch with another {name} ({self.settings[name]}), expected {value}: go on "
                    "with the same, or use another folder"
                )
        check_regular(self.path)
        try:
            is_cut = self.path.exists() and self.path.stat().st_size > self.ends.get(self.path, 0)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error.strerror}") from error
        if is_cut:
            self.write(b"\n")
        if not self.settings:
            self.settings = dict(settings)
            self.add({"format": FORMAT, **settings})

    def is_done(self, job: str) -> bool:
        """Whether a job is finished, and its pictures are still there."""
        return job in self.done and all((self.folder / name).exists() for name in self.done[job])

    def finish(self, job: str, pictures: Sequence[str], options: Mapping[str, Any]) -> None:
        """Note that a job's pictures are there."""
        self.add({"job": job, "pictures": list(pictures), "options": dict(options)})

    def fail(self, job: str, error: str) -> None:
        """Note why a job could not be done; another time it is tried again."""
        self.add({"job": job, "error": error})

    def check_weights(self, digests: Mapping[str, str]) -> None:
        """Note the weights that the next jobs use. InputError where others had the same name."""
        for name, digest in digests.items():
            if self.weights.get(name, digest) != digest:
                raise InputError(
                    f"{name} is not the file that this batch began with (sha256 {digest[:12]}, expected "
                    f"{self.weights[name][:12]}): use another folder, or that file"
                )
        if digests.items() - self.weights.items():
            self.add({"weights": dict(digests)})

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a line, and have it on the disk. InputError where the system cannot."""
        self.write(json.dumps(entry).encode() + b"\n")
        self.take(entry)

    def write(self, line: bytes) -> None:
        assert self.file is not None
        try:
            if os.write(self.file, line) != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self.file)
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error.strerror}") from error
        self.ends[self.path] = os.fstat(self.file).st_size

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def read_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
