"""What is the user's stays the user's: no result replaces a file that a command reads.

Imported where something lies at a target already, or beside it from a process that was killed.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.names import REPOSITORY
from sdxl_ref.weights.opening import POCKET

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's; read with the adapter that it lies beside
Inode = tuple[int, int]


def prepare(targets: Sequence[Path], read: Sequence[object]) -> None:
    """InputError where a target is a file that is read; else what killed processes left beside them is deleted.

    `read` are paths, names of models, and addresses, or None. Of a folder every file below it counts as read, through
    links too.
    """
    for source in (source for source in read if source is not None):
        check_apart(targets, source)
    for folder in {Path(os.path.realpath(target)).parent for target in targets}:
        clear(folder)


def check_apart(targets: Sequence[Path], source: object) -> None:
    """InputError where one of the targets is there and is a file of a source, by whatever name."""
    inodes = {inode(target): target for target in targets if os.path.exists(target)}
    for path in files_of(source) if inodes else ():
        if os.path.isfile(path) and inode(path) in inodes:
            whose = "" if str(path) == str(source) else f", as a file of {source}"
            raise InputError(f"cannot write {inodes[inode(path)]}: it is read{whose}: choose another place")


def files_of(source: object) -> Iterator[str | Path]:
    """Every file that a path, a model's name or an address stands for; what is not on this machine has none."""
    name = str(source)
    if os.path.isdir(name):
        yield from files_below(name)
    elif os.path.exists(name):
        yield name
        if name.endswith(".safetensors"):
            yield Path(name).with_name(ADAPTER_CONFIG)
    elif name in ("pocket", *POCKET):
        yield from POCKET.values()
    elif REPOSITORY.fullmatch(name):
        yield from files_below(snapshots(name))


def files_below(folder: str | Path) -> Iterator[str]:
    """All files of a folder and of what links in it lead to."""
    visited: set[Inode] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if inode(parent) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(inode(parent))
        yield from (os.path.join(parent, name) for name in names)


def snapshots(repository: str) -> Path:
    """Where the hub's cache keeps a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def inode(path: str | Path) -> Inode:
    """What tells a file or folder from all others, whatever its name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
