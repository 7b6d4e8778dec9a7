"""What processes left beside a target when they were killed while they wrote there: found by its name, and cleared."""

import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sdxl_ref.weights.folder_saving import MOVED_AWAY
from sdxl_ref.weights.saving import MACHINE, PREFIX, SUFFIX

TEMPORARY = re.compile(rf"{re.escape(PREFIX)}(?P<machine>[^-]+)-(?P<process>\d+)-[0-9a-f]+{re.escape(SUFFIX)}")
CONTAINER = re.compile(r"_40\d{8}(_|$)")  # Linux's number of a namespace of processes
DAY = 24 * 3600.0
SLACK = 5.0  # seconds: what clocks and their ticks may differ by


def clear(folder: Path) -> None:
    """Delete what processes of this machine left in a folder when they were killed while they wrote."""
    for leftover in folder.glob(f"{PREFIX}*{SUFFIX}"):
        fields = TEMPORARY.fullmatch(leftover.name)
        if fields is None or not is_left_behind(leftover, fields["machine"], int(fields["process"])):
            continue
        with suppress(OSError):
            put_back(leftover)  # before the rest is deleted: it may be the only copy
            shutil.rmtree(leftover)


def is_left_behind(leftover: Path, machine: str, process: int) -> bool:
    """Whether nobody writes there any more. Of another container of this machine that is so after a day of rest."""
    if machine == MACHINE:
        return not is_in_use(leftover, process)
    if CONTAINER.sub("_", machine, count=1) != CONTAINER.sub("_", MACHINE, count=1):
        return False
    with suppress(OSError):
        return idle_time(leftover) > DAY
    return False


def is_in_use(leftover: Path, process: int) -> bool:
    """Whether the process that wrote there still runs.

    One of its number that began only after the last change there is another one: numbers are given again, after a
    restart above all. Where the system does not tell when a process began, it is taken for the one that wrote.
    """
    age = process_age(process)
    if age is None:
        return is_running(process)
    with suppress(OSError):
        return idle_time(leftover) < age + SLACK
    return True


def idle_time(leftover: Path) -> float:
    """The seconds since something changed in a temporary folder, by the clock of its own file system."""
    last_change = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
    with tempfile.TemporaryFile(dir=leftover.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime - last_change


def process_age(process: int) -> float | None:
    """The seconds since a process of this machine began; None where Linux does not tell, or it is no more."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # from the third one on
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def put_back(leftover: Path) -> None:
    """Give a target that was moved away its name again where the new one never got it."""
    moved_away = leftover / MOVED_AWAY
    for old in moved_away.iterdir() if moved_away.is_dir() else ():
        target = leftover.parent / old.name
        if not os.path.lexists(target):
            old.rename(target)


def is_running(process: int) -> bool:
    """Whether a process of this machine lives; somebody else's counts, and so does what the system does not tell."""
    if sys.platform == "win32":
        return True  # there the call below would interrupt it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
