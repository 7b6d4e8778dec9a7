"""Write folders so that nothing is ever half written: beside the target first, then exchanged with what was there."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdxl_ref.weights.saving import explained, make_permanent, sync, temporary_folder, usual_rights

MOVED_AWAY = "old"  # in the temporary folder: where an old target waits while the new one takes its name


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A path to make a folder at; it gets the target's name once the block has ended without an error.

    What was there stays whole until then; it is replaced with all that it held. A link stays, and what it points to is
    replaced. InputError where the system cannot write. A process that is killed meanwhile leaves a folder beside the
    target: `leftovers.clear` deletes it.
    """
    with explained(target):
        final = Path(os.path.realpath(target))
        with temporary_folder(final.parent) as temporary:
            new = temporary / "new"
            yield new
            make_all_permanent(new, usual_rights(temporary))
            put_in_place(new, final)
            with suppress(OSError):
                sync(final.parent)


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


def put_in_place(new: Path, target: Path) -> None:
    """Rename in one step. A folder changes places with the one that is there, which is deleted as temporary."""
    if not target.is_dir():
        new.replace(target)
    elif not exchange(new, target):
        replace_in_two_steps(new, target)


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
