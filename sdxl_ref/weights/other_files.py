"""What is wrong with a file that does not open as safetensors, in one line, with what to do. Loaded only then."""

import json
import os
import stat
import zipfile
from pathlib import Path

PICKLE = (
    "is a pickle, which can run any code when opened: expected a safetensors file; if you trust it, convert it: "
    "s = torch.load(FILE, weights_only=True); s = s.get('state_dict', s); safetensors.torch.save_file("
    "{k: v.clone().contiguous() for k, v in s.items() if torch.is_tensor(v)}, OUT)"
)
PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
POINTER = b"version https://git-lfs.github.com/spec/v1"
AGAIN = "expected a safetensors file: download the file itself"
BEGINNINGS = (  # what a file of this kind begins with, in lower case
    (b"<!doctype html", f"is a page of HTML, as a server sends instead of a model: {AGAIN}"),
    (b"<html", f"is a page of HTML, as a server sends instead of a model: {AGAIN}"),
    (b"<?xml", f"is an XML text, as a server sends instead of a model: {AGAIN}"),
    (b"{", f"is a JSON text: {AGAIN}"),
    (b"gguf", "is a GGUF file, of quantised weights: expected a safetensors file of the same model"),
    (b"\x89png", "is a PNG picture: expected a safetensors file"),
    (b"\xff\xd8\xff", "is a JPEG picture: expected a safetensors file"),
    (b"\x89hdf", "is an HDF5 file: expected a safetensors file"),
    (b"pk\x03\x04", "is a zip archive: expected the safetensors file in it"),
    (b"7z\xbc\xaf", "is a 7z archive: expected the safetensors file in it"),
    (b"\x1f\x8b", "is a gzip archive: expected the safetensors file in it"),
)
NO_FILES = (  # what there can be under a name besides a file
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def what_is_wrong(path: Path, error: Exception, is_pickle: bool) -> str:
    """The message for a path that safetensors could not read with this error. `is_pickle`: by its name."""
    if not os.path.exists(path):
        return f"could not read {path}: no such file"
    mode = os.stat(path).st_mode
    for is_kind, name in NO_FILES:
        if is_kind(mode):
            return f"{path} is {name}: expected a safetensors file"
    kind = PICKLE if is_pickle else by_content(path)
    return f"{path} {kind}" if kind else not_whole(path, error)


def by_content(path: Path) -> str:
    """What a file is, by its first bytes; empty where nothing is known of it."""
    try:
        with path.open("rb") as file:
            first = file.read(1024)
    except OSError:
        return ""
    if first.startswith(POINTER):
        size = next((line[5:].decode("ascii", "replace") for line in first.splitlines() if line[:5] == b"size "), "?")
        return f"is a pointer of git-lfs, not the file of {size} bytes that it stands for: run `git lfs pull`"
    if is_pickled(first, path):
        return PICKLE
    beginning = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for magic, what in BEGINNINGS if beginning.startswith(magic)), "")


def is_pickled(first: bytes, path: Path) -> bool:
    """Whether `torch.save` wrote it: in its old form, a pickle, or in its new one, a zip archive around one."""
    begins_a_header = first[8:9] == b"{"  # a safetensors file of such a length begins with the same two bytes
    if first[:2] in PICKLE_PROTOCOLS and not begins_a_header:
        return True
    if not first.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def not_whole(path: Path, error: Exception) -> str:
    """The message for a file of which nothing else is known: often one whose download was cut off."""
    whole = length_of_whole(path)
    size = os.path.getsize(path)
    message = f"expected a whole safetensors file, could not read {path}: {str(error)[:200] if size else 'it is empty'}"
    if whole > size:
        return f"{message}: it has {size} of {whole} bytes: download it again"
    return f"{message}: download it again"


def length_of_whole(path: Path) -> int:
    """How long a file has to be by its own header; 0 where that cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                return 0
            tensors = json.loads(file.read(length))
        ends = [fields["data_offsets"][1] for name, fields in tensors.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0
