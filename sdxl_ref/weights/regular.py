"""Only regular files are read: a pipe keeps its reader waiting for ever, and a device may never end."""

import os
from pathlib import Path

from sdxl_ref.config import InputError


def check_regular(path: str | Path) -> None:
    """InputError for a pipe, a socket or a device. What is not there is left to who opens it, and so is a folder."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path} is a pipe or a device: expected a regular file, copy its content into one")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text in a regular file. InputError for what is none, or holds bytes that are no such text."""
    check_regular(path)
    try:
        return path.read_text(encoding)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"could not read {path} as UTF-8 text: {reason}") from error
