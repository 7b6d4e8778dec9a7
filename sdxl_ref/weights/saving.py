"""Write files so that nothing is ever half written: beside the target first, then renamed.

All of the package's results go through `replacing`, or `replacing_folder` of `folder_saving.py`. What a process writes
lies in `.sdxl-ref-MACHINE-PROCESS-….part` beside the target until it is whole; `leftovers.py` clears what killed
processes left.
"""

import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sdxl_ref.config import InputError

PREFIX = ".sdxl-ref-"
SUFFIX = ".part"
MACHINE = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64] or "unnamed"
with suppress(OSError):  # Linux tells containers and machines of one name apart
    MACHINE += f"_{os.stat('/proc/self/ns/pid').st_ino}"
    MACHINE += f"_{uuid.uuid5(uuid.NAMESPACE_OID, Path('/etc/machine-id').read_text()).hex[:8]}"


def put_file(new: Path, target: Path, rights: int) -> None:
    """Give a whole file its name, in one step. The rights are those of a new file here."""
    make_permanent(new, rights)
    new.replace(target)


@contextmanager
def replacing(target: Path, put: Callable[[Path, Path, int], None] = put_file) -> Iterator[Path]:
    """A path to write a file at; it gets the target's name once the block has ended without an error.

    What was there stays whole until then. A link stays, and what it points to is replaced. InputError where the system
    cannot write. A process that is killed meanwhile leaves a folder beside the target: `leftovers.clear` deletes it.
    """
    with explained(target):
        final = Path(os.path.realpath(target))
        with temporary_folder(final.parent) as temporary:
            new = temporary / "new"
            yield new
            put(new, final, usual_rights(temporary))
            with suppress(OSError):  # some network drives have no such thing
                sync(final.parent)


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """InputError for what the system says against writing there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"could not write {target}: {reason}") from error


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder whose name says who writes in it; deleted in the end with whatever it holds."""
    folder = parent / temporary_name(os.getpid())
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_name(process: int) -> str:
    """A new name for what a process of this machine writes."""
    return f"{PREFIX}{MACHINE}-{process}-{uuid.uuid4().hex[:8]}{SUFFIX}"


def usual_rights(folder: Path) -> int:
    """The rights of a new file, asked of one: the process's mask cannot be read without changing it for all threads."""
    probe = folder / "probe"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def make_permanent(file: Path, rights: int) -> None:
    """Have a file on the disk, with these rights (safetensors writes for the owner alone).

    Or a power cut could leave a renamed file of zeros.
    """
    sync(file)
    file.chmod(rights)


def sync(path: Path) -> None:
    """Have the contents of a file, or the names in a folder, on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
