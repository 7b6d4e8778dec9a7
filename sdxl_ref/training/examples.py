"""What a folder of training pictures gives: examples, the text files that were read, and notes on what was not."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
SHOWN = 3  # names in a note


@dataclass(frozen=True)
class Example:
    """A picture with one of its captions."""

    path: Path
    text: str
    aesthetic_score: float | None = None


@dataclass(frozen=True)
class Examples:
    """The examples of a folder in their order, the text files that they come from, and lines for the user."""

    examples: list[Example]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder by their paths, hidden ones and those of hidden folders left out; links are followed."""
    files: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Also the folder in which macOS packs what is hidden there."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def counted(paths: Sequence[Path], folder: Path, noun: str) -> str:
    """How many there are, and the first of them in parentheses: `5 pictures (a.png, b.png, c.png, …)`."""
    names = [path.relative_to(folder).as_posix() for path in paths[:SHOWN]]
    more = ", …" if len(paths) > SHOWN else ""
    return f"{len(paths)} {noun}{'' if len(paths) == 1 else 's'} ({', '.join(names)}{more})"
