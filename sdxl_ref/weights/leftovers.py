"""What processes left beside a target when they were killed while they wrote there: found by its name, and cleared."""

import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from sdxl_ref.weights.folder_saving import MOVED_AWAY
from sdxl_ref.weights.saving import MACHINE, PREFIX, SUFFIX, at_work

TEMPORARY = re.compile(rf"{re.escape(PREFIX)}(?P<machine>[^-]+)-(?P<process>\d+)-[0-9a-f]+{re.escape(SUFFIX)}")


def clear(folder: Path) -> None:
    """Delete what processes of this machine left in a folder when they were killed while they wrote."""
    for leftover in folder.glob(f"{PREFIX}*{SUFFIX}"):
        fields = TEMPORARY.fullmatch(leftover.name)
        if fields is None or fields["machine"] != MACHINE or is_in_use(leftover.name, int(fields["process"])):
            continue
        with suppress(OSError):
            put_back(leftover)  # before the rest is deleted: it may be the only copy
            shutil.rmtree(leftover)


def is_in_use(name: str, process: int) -> bool:
    """Whether a process of this machine still writes there. An earlier one may have had this one's number."""
    return name in at_work if process == os.getpid() else is_running(process)


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
