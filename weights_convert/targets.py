"""What is asked of a target before anything is written."""

import os
import shutil
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.tensor_files import FOLDER_INDEX


def check_target(target: Path, size: int, force: bool) -> None:
    """InputError unless `size` bytes can be written there, and nothing is there yet (or `force` is given).

    Deletes what killed processes left beside it, so that nothing piles up.
    """
    check_name(target)
    check_replaceable(target, force)
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {target}: expected an existing, writable folder {folder}")
    clear(folder)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{target} needs {size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def check_name(target: Path) -> None:
    """InputError for a name that is none, or that the system does not take."""
    if target.name in ("", ".."):
        raise InputError(f"expected a target with a name of its own, found {target}: name the file or folder")
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def check_replaceable(target: Path, force: bool) -> None:
    """InputError where something is there that is not to be replaced."""
    exists = target.exists()
    if exists and not force:
        raise InputError(f"{target} is there already: name another target, or give --force to replace it")
    if target.is_symlink() or (exists and not (target.is_file() or target.is_dir())):
        raise InputError(f"{target} is a link or a device, no file or folder: name another target")
    if target.is_dir() and any(target.iterdir()) and not (target / FOLDER_INDEX).is_file():
        raise InputError(f"{target} is a folder that holds other things than a model: name another target")


def check_apart(source: Path, target: Path) -> None:
    """InputError where one of two folders lies inside the other."""
    real_source = Path(os.path.realpath(source))
    real_target = Path(os.path.realpath(target))
    if real_source in real_target.parents or real_target in real_source.parents:
        raise InputError(f"{target} and {source} lie one inside the other: name another target")
