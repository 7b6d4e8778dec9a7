"""One process at a time: locks that end with the process that has them, however it ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.regular import check_regular

if sys.platform != "win32":
    import fcntl


@contextmanager
def locked(folder: Path, refusal: str, name: str = ".lock") -> Iterator[None]:
    """Nobody else has a lock of a folder meanwhile, which is made if need be. InputError, `refusal`, where one has.

    A file system without locks (and Windows) is trusted.
    """
    path = folder / name
    check_regular(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise InputError(f"could not write to the folder {folder}: {error.strerror}") from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(refusal) from error
            except OSError:
                pass
        yield
