"""`sdxl-ref info`: what a checkpoint is, from its header; with a check, from one pass over the whole file."""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from sdxl_ref.checkpoint import CONFIG_KEY, EXTRAS, KNOWN_FILES, Checkpoint, open_checkpoint, prefixes
from sdxl_ref.config import InputError
from sdxl_ref.folder import is_finite
from sdxl_ref.hub import resolve

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", metavar="MODEL", help="file, folder, repository, pocket-base or pocket-refiner")
    p.add_argument("--check", action="store_true", help="read the whole file once: its sha256, and that all is finite")


def run(a: argparse.Namespace) -> None:
    for line in list(report(resolve(a.checkpoint), a.check)):
        print("".join(c if c.isprintable() else "?" for c in line))  # a file may name its tensors as it likes


def report(path: Path, check: bool) -> Iterator[str]:
    """The lines to print. With `check`, InputError where a tensor holds NaN or infinity, with its name."""
    checkpoint = open_checkpoint(path)
    yield f"{checkpoint.path}: {checkpoint.name}"
    if checkpoint.note:
        yield f"note: {checkpoint.note}"
    with checkpoint.reader() as read:  # maps tensors, reads nothing
        found = {key: read(key).dtype for key in checkpoint.shapes}
    dtype_of = {key: NAMES.get(dtype, str(dtype).removeprefix("torch.")) for key, dtype in found.items()}
    for part, prefix in prefixes(checkpoint.config).items():
        keys = [key for key in checkpoint.shapes if key.startswith(prefix) and not EXTRAS.fullmatch(key)]
        dtypes = ", ".join(sorted({dtype_of[key] for key in keys}))
        parameters = sum(math.prod(checkpoint.shapes[key]) for key in keys)
        yield f"{part:<15} {len(keys):>5} tensors {parameters:>13,} parameters  {dtypes}"
    extras = [key for key in checkpoint.shapes if EXTRAS.fullmatch(key)]
    yield f"extras: {', '.join(extras) or 'none'}"
    for key, value in checkpoint.metadata.items():
        if key != CONFIG_KEY:
            yield f"{key}: {value[:100]}"
    digest = ""
    if check:
        digest = scan(checkpoint)
        yield f"sha256: {digest} ({KNOWN_FILES.get(digest, ('not an official file',))[0]})"
        yield "finite: every value of every tensor"
    yield f"VAE: {checkpoint.vae_name(digest)}{'' if check else ' (--check compares the file with the official ones)'}"


def scan(checkpoint: Checkpoint) -> str:
    """Read the file once, front to back: its sha256. InputError names tensors with values that are not finite."""
    if checkpoint.path.is_dir():
        with checkpoint.reader() as read:
            told(checkpoint, [key for key in checkpoint.shapes if not is_finite(read(key))])
        return checkpoint.sha256()
    digest, bad = hashlib.sha256(), []
    with checkpoint.path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        digest.update(start + header)
        tensors = {key: each for key, each in json.loads(header).items() if key != "__metadata__"}
        for key, each in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = each["data_offsets"]
            data = bytearray(file.read(end - begin))
            digest.update(data)
            if each["dtype"] in FLOATS and data:
                values = torch.frombuffer(data, dtype=FLOATS[each["dtype"]])
                if not is_finite(values):
                    bad.append(key)
    told(checkpoint, bad)
    return digest.hexdigest()


def told(checkpoint: Checkpoint, bad: list[str]) -> None:
    if bad:
        raise InputError(f"{checkpoint.path}: {len(bad)} tensors hold NaN or infinite values: {', '.join(bad[:5])}")
