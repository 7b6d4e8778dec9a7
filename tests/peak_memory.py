"""How much the resident memory of this process grew at its highest, exactly, from the kernel. Linux alone."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

RESET_PEAK = "5"  # see proc(5), clear_refs


class Peak:
    """`with Peak() as peak: …`, then `peak.bytes` above what there was, and `peak.anonymous` of the whole process."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        highest = status("VmHWM")
        self.bytes = highest - self.before
        self.anonymous = highest - status("RssFile") - status("RssShmem")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
