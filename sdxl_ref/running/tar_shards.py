"""Jobs that come in a tar file, as the webdataset library writes it. Loaded where there is one.

The files of one name are a job: `.json` with its options, `.txt` with its prompt, a picture. What a job says of its
picture is the tar's path and the picture's name in it; it is taken out when the job is done.
"""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.training.examples import is_picture

INSTALL = "jobs in a tar file are read by the webdataset library: pip install 'sdxl-ref[batch]'"
SUFFIX = ".tar"


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """Of each job the bytes of its files by their suffixes, and its name as `__key__`, in the order of the tar.

    InputError where webdataset is not installed, or for a file that is no such tar.
    """
    try:
        from webdataset.tariterators import group_by_keys, tar_file_iterator
    except ImportError as error:
        raise InputError(INSTALL) from error
    try:
        with path.open("rb") as stream:  # webdataset itself would take a name apart: it may hold a command
            files = ({**file, "__url__": str(path)} for file in tar_file_iterator(stream))
            yield from group_by_keys(files, lcase=False)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise InputError(f"could not read {path} as a tar of jobs: {error}") from error


def picture_of(path: Path, sample: dict[str, Any]) -> str | None:
    """The path of a sample's picture, through its tar; None where it has none."""
    names = [f"{sample['__key__']}.{suffix}" for suffix in sample if is_picture(Path(f"x.{suffix}"))]
    return f"{path}/{names[0]}" if names else None


@contextmanager
def taken_out(image: str) -> Iterator[str]:
    """The path of a picture for as long as it is read: of one in a tar that of a copy."""
    for tar in Path(image).parents:
        if tar.suffix.lower() == SUFFIX and tar.is_file():
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / Path(image).name
                copy.write_bytes(member(tar, str(Path(image).relative_to(tar))))
                yield str(copy)
            return
    yield image


def member(tar: Path, name: str) -> bytes:
    """A file in a tar. InputError where it is not there, or cut off."""
    known = places(tar, tar.stat().st_mtime_ns)
    if name not in known:
        raise InputError(f"{tar} holds no {name}")
    offset, size = known[name]
    with tar.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise InputError(f"{tar} ends inside of {name}: it is cut off")
    return content


@lru_cache(maxsize=4)
def places(tar: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where each file of a tar lies: its beginning and its size."""
    try:
        with tarfile.open(tar, "r:") as archive:
            return {str(Path(info.name)): (info.offset_data, info.size) for info in archive if info.isreg()}
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"could not read {tar}: {error}") from error
