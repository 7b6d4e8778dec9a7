"""Batches in tests: lists of jobs, and what a batch leaves."""

import hashlib
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]


def write(lines: Lines, path: str = "jobs.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prompts(count: int) -> Lines:
    return [{"prompt": f"a barn, number {i}", "seed": i} for i in range(count)]


def hashes(folder: str = "out") -> dict[str, str]:
    """Of every picture by its name: of the file, settings included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("**/*.png")}


def finished(folder: str = "out") -> Lines:
    """What the records say of finished jobs, in lines that are whole."""
    lines = [line for path in Path(folder).glob("record*.jsonl") for line in path.read_text().splitlines()]
    return [entry for entry in map(json.loads, (line for line in lines if line.endswith("}"))) if "pictures" in entry]


def jobs_of(folder: str = "out") -> Counter[str]:
    """How often the records say of each job that it was finished."""
    return Counter(entry["job"] for entry in finished(folder))


def wait_for(running: subprocess.Popen[str], jobs: int) -> None:
    """Until so many pictures are there."""
    while len(hashes()) < jobs:
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
