"""What is in a file or folder, whether it is whole and genuine, and how two differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl_ref.checkpoint import EXTRAS, KNOWN_FILES, Checkpoint, open_checkpoint, prefixes
from sdxl_ref.config import InputError
from sdxl_ref.folder import sha256_of
from weights_convert.convert import dtypes_of
from weights_convert.stream import HASH_KEY

Json = dict[str, Any]


def inspect(path: Path, variant: str | None = None) -> Json:
    """What it is, its parts with their sizes and dtypes, extras, its autoencoder: reads the VAE's tensors alone."""
    checkpoint = open_checkpoint(path, variant)
    dtypes = dtypes_of(checkpoint)
    parts = {}
    for part, prefix in prefixes(checkpoint.config).items():
        keys = [key for key in checkpoint.shapes if key.startswith(prefix) and not EXTRAS.fullmatch(key)]
        parts[part] = {
            "tensors": len(keys),
            "parameters": sum(math.prod(checkpoint.shapes[key]) for key in keys),
            "dtypes": sorted({str(dtypes[key]).removeprefix("torch.") for key in keys}),
        }
    known = tuple(prefixes(checkpoint.config).values())
    extras = [key for key in checkpoint.shapes if not key.startswith(known) or EXTRAS.fullmatch(key)]
    return {
        "path": str(path),
        "model": checkpoint.name,
        "note": checkpoint.note,
        "parts": parts,
        "extras": sorted(extras),
        "vae": checkpoint.vae_name(""),
        "metadata": {key: value for key, value in checkpoint.metadata.items() if len(value) < 200},
    }


@dataclass(frozen=True)
class Verdict:
    """A check by name, whether it holds, and what was found."""

    check: str
    holds: bool
    found: str


def verify(path: Path, variant: str | None = None) -> list[Verdict]:
    """Keys and shapes; the file's sha256 among the official ones; its own hash of tensors; every value finite."""
    checkpoint = open_checkpoint(path, variant)  # strict: raises where keys or shapes do not fit
    verdicts = [
        Verdict("keys and shapes", True, f"{len(checkpoint.shapes)} tensors of an SDXL {checkpoint.config.kind}")
    ]
    if checkpoint.path.is_file():
        digest = checkpoint.sha256()
        name, vae = KNOWN_FILES.get(digest, ("", ""))
        known = f"{name}.safetensors, VAE {vae}" if name else "of no official file"
        verdicts.append(Verdict("sha256", True, f"{digest}: {known}"))
        verdicts += own_hash(checkpoint)
    bad = []
    with checkpoint.reader() as get:
        for key in sorted(checkpoint.shapes):
            if not torch.isfinite(get(key)).all():
                bad.append(key)
    found = f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:3])}" if bad else "all"
    return [*verdicts, Verdict("finite values", not bad, found)]


def own_hash(checkpoint: Checkpoint) -> list[Verdict]:
    """The hash of all tensors that a file's metadata may carry (ModelSpec), against its tensors."""
    claimed = checkpoint.metadata.get(HASH_KEY)
    if claimed is None:
        return []
    with checkpoint.path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    found = f"0x{sha256_of(checkpoint.path, start=8 + header)}"
    return [
        Verdict("ModelSpec hash", claimed == found, found if claimed == found else f"{found}, but it says {claimed}")
    ]


@dataclass(frozen=True)
class Difference:
    """A tensor of two checkpoints: largest difference, and the L2 distance relative to the first."""

    key: str
    largest: float
    relative: float


def diff(first: Path, second: Path, variant: str | None = None) -> Json:
    """Keys that only one has, shapes that differ, and values that differ, in official names whatever the layouts."""
    a, b = open_checkpoint(first, variant), open_checkpoint(second, variant)
    if a.config.kind != b.config.kind:
        raise InputError(f"{first} is a {a.config.kind}, {second} a {b.config.kind}: they have no tensors to compare")
    common = sorted(a.shapes.keys() & b.shapes.keys())
    shapes = [key for key in common if a.shapes[key] != b.shapes[key]]
    dtypes = dtypes_of(a), dtypes_of(b)
    found, equal = [], 0
    with a.reader() as read_a, b.reader() as read_b:
        for key in (key for key in common if a.shapes[key] == b.shapes[key]):
            x, y = read_a(key), read_b(key)
            if x.dtype == y.dtype and torch.equal(x, y):
                equal += 1
                continue
            change = (y.double() - x.double()).abs()
            relative = float(change.norm() / x.double().norm().clamp_min(1e-300))
            found.append(Difference(key, float(change.max()), relative))
    return {
        "only in the first": sorted(a.shapes.keys() - b.shapes.keys()),
        "only in the second": sorted(b.shapes.keys() - a.shapes.keys()),
        "of another shape": shapes,
        "of another dtype": [key for key in common if dtypes[0][key] != dtypes[1][key]],
        "equal": equal,
        "different": [asdict(each) for each in sorted(found, key=lambda each: -each.relative)],
    }
