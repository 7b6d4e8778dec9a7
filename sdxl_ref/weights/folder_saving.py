"""Write folders so that nothing is ever half written: beside the target first, then exchanged with what was there.

And give files and folders names that have to be free: what has come there meanwhile stays.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.saving import make_permanent, replacing, sync

MEANWHILE = "{target} has come there meanwhile, and stays: name another target, or give --force to replace it"
MOVED_AWAY = "old"  # in the temporary folder: where an old target waits while the new one takes its name


CarryOver = Callable[[Path, Path], object]  # called with the old folder and the new one, before they change places


def leave_behind(_old: Path, _new: Path) -> None:
    """Nothing of the old folder goes into the new one."""


def replacing_folder(target: Path, carry_over: CarryOver = leave_behind) -> AbstractContextManager[Path]:
    """As `replacing`, for a folder: a path to make it at.

    What was there is replaced with all that it held, but for what `carry_over` puts into the new one.
    """
    return replacing(target, partial(put_folder, carry_over=carry_over))


def new_folder(target: Path) -> AbstractContextManager[Path]:
    """As `replacing_folder`, where nothing may be: InputError where something has come there by the end."""
    return replacing(target, put_new_folder)


def put_folder(new: Path, target: Path, rights: int, carry_over: CarryOver = leave_behind) -> None:
    """Give a whole folder its name, in one step; it changes places with one that is there, which is then deleted."""
    make_all_permanent(new, rights)
    if not target.is_dir():
        new.replace(target)
        return
    carry_over(target, new)
    if not exchange(new, target):
        replace_in_two_steps(new, target)


def put_new_folder(new: Path, target: Path, rights: int) -> None:
    """Give a whole folder its name where that is free: no system renames a folder onto one that holds something."""
    make_all_permanent(new, rights)
    try:
        new.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise InputError(MEANWHILE.format(target=target)) from error
        raise


def put_new(new: Path, target: Path) -> None:
    """Give a file its name in one step. FileExistsError where something has it, which stays."""
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        new.rename(target)
    else:
        new.unlink()


def make_all_permanent(folder: Path, rights: int) -> None:
    """Have all in a folder on the disk; files get these rights. Links are not followed."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            make_all_permanent(path, rights)
        else:
            make_permanent(path, rights)
    with suppress(OSError):  # some network drives have no such thing
        sync(folder)


def exchange(first: Path, second: Path) -> bool:
    """Have Linux swap two names in one step (renameat2); False where that is not to be had."""
    if sys.platform != "linux":
        return False
    current_folder = -100
    swap = 2
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        status = libc.renameat2(current_folder, os.fsencode(first), current_folder, os.fsencode(second), swap)
    except (AttributeError, OSError):  # an older C library
        return False
    return bool(status == 0)


def replace_in_two_steps(new: Path, target: Path) -> None:
    """For folders where names cannot be swapped. After a kill between the steps `clear` puts the old one back."""
    old = new.with_name(MOVED_AWAY) / target.name
    old.parent.mkdir()
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
