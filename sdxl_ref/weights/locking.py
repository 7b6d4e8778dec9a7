"""One process at a time: locks that end with the process that has them, however it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdxl_ref.config import InputError

if sys.platform != "win32":
    import fcntl


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Nobody else has the lock of a folder meanwhile, which is made if need be. InputError, `refusal`, where one has.

    A file system without locks (and Windows) is trusted.
    """
    path = folder / ".lock"
    if os.path.exists(path) and not path.is_file():
        raise InputError(f"{path} is no file: delete it, or use another folder")
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
