"""Run a command and measure it: wall time, peak resident memory, peak anonymous memory.

A small process of its own stands between: on Linux a child starts with the peak (`ru_maxrss`) of the process that
started it, which may have held a whole model. The anonymous part (RssAnon, what mapped files do not count in) is
sampled; it is 0 where there is no /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

INTERVAL = 0.02  # seconds between two samples


class Measured(NamedTuple):
    seconds: float
    peak: int  # bytes, ru_maxrss
    peak_anonymous: int  # bytes
    output: str  # standard output


def measure(command: Sequence[str], **environment: str) -> Measured:
    """Run a command to its end. RuntimeError with the end of its standard error where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        between = [sys.executable, __file__, str(report), *command]
        env = os.environ | environment
        done = subprocess.run(between, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:4])} … ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return Measured(**json.loads(report.read_text()), output=done.stdout)


def watch(pid: int, peaks: list[int], done: threading.Event) -> None:
    while not done.wait(INTERVAL):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        peaks += [1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
        peaks[:] = [max(peaks)] if peaks else []


def main(report: str, *command: str) -> int:
    """Start the command, sample it, write the report; the exit status is the command's."""
    peaks: list[int] = []
    done = threading.Event()
    began = time.perf_counter()
    child = subprocess.Popen(command)
    sampler = threading.Thread(target=watch, args=(child.pid, peaks, done))
    sampler.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {"seconds": seconds, "peak": usage.ru_maxrss * unit, "peak_anonymous": max(peaks, default=0)}
    Path(report).write_text(json.dumps(figures))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
