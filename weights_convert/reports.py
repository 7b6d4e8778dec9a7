"""What is in a file or folder, whether it is whole and genuine, and how two differ."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.checkpoint import EXTRAS, KNOWN_FILES, Checkpoint, open_checkpoint, prefixes, sha256_of
from sdxl_ref.config import InputError
from sdxl_ref.folder import INDEX, Folder, headers, is_finite
from weights_convert.convert import dtypes_of
from weights_convert.parts import is_vae, weights_file
from weights_convert.stream import HASH_KEY, dtypes_in

Json = dict[str, Any]
OFFICIAL_SIZES = (6_075_981_930, 6_938_078_334)  # bytes of the official files, with either VAE: others need no hash
VAES = {  # sha256 of files that hold a VAE alone -> whose they are, as the hub's repositories list them
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": "stabilityai/sdxl-vae",
    "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341": "stabilityai/sdxl-vae",
    "bcb60880a46b63dea58e9bc591abe15f8350bde47b405f9c38f4be70c6161e68": "stabilityai/sdxl-vae in float16",
    "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1": "fp16-fix (madebyollin/sdxl-vae-fp16-fix)",
    "1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c": "fp16-fix (madebyollin/sdxl-vae-fp16-fix)",
}


def inspect(path: Path, variant: str | None = None) -> Json:
    """What it is, its parts with their sizes and dtypes, extras, its autoencoder, which may be all that a file holds.

    Reads the VAE's tensors, and the whole file only where it has the size of an official one.
    """
    if not os.path.isfile(path / INDEX) and is_vae(file := weights_file(path)):
        return inspect_vae(path, file)
    checkpoint = open_checkpoint(path, variant)
    dtypes = dtypes_of(checkpoint)
    parts = {}
    for part, prefix in prefixes(checkpoint.config).items():
        keys = [key for key in checkpoint.shapes if key.startswith(prefix) and not EXTRAS.fullmatch(key)]
        parts[part] = summary({key: checkpoint.shapes[key] for key in keys}, dtypes)
    known = tuple(prefixes(checkpoint.config).values())
    extras = [key for key in checkpoint.shapes if not key.startswith(known) or EXTRAS.fullmatch(key)]
    return {
        "path": str(path),
        "model": checkpoint.name,
        "note": checkpoint.note,
        "parts": parts,
        "extras": sorted(extras),
        "vae": vae_of(checkpoint),
        "metadata": {key: value for key, value in checkpoint.metadata.items() if len(value) < 200},
    }


def inspect_vae(path: Path, file: Path) -> Json:
    """The same of a file that holds an autoencoder alone, told by the file's sha256."""
    digest, shapes = sha256_of(file), {name: shape for name, (_, _, shape) in headers(file).items()}
    found = {"path": str(path), "model": "an SDXL autoencoder (by its keys)", "note": "", "extras": [], "metadata": {}}
    parts = {"vae": summary(shapes, dtypes_in(file))}
    return found | {"parts": parts, "vae": f"{VAES.get(digest, 'unknown')}, file sha256 {digest}"}


def summary(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> Json:
    """How many tensors and parameters, and their dtypes."""
    return {
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtypes": sorted({str(dtypes[key]).removeprefix("torch.") for key in shapes}),
    }


def vae_of(checkpoint: Checkpoint) -> str:
    """Which autoencoder a checkpoint holds: by the sha256 of an official file, or of a folder's file of the VAE."""
    digest = ""
    if isinstance(checkpoint, Folder):
        prefix = prefixes(checkpoint.config)["vae"]
        files = {path for key, (_, found) in checkpoint.sources.items() if key.startswith(prefix) for path, _ in found}
        digest = sha256_of(*sorted(files))
    elif checkpoint.path.stat().st_size in OFFICIAL_SIZES:
        digest = checkpoint.sha256()
    release, _, tensors = checkpoint.vae_name(digest).partition(", ")
    return f"{VAES.get(digest, release)}, {tensors}"


@dataclass(frozen=True)
class Verdict:
    """A check by name, whether it holds, and what was found."""

    check: str
    holds: bool
    found: str


def verify(path: Path, variant: str | None = None) -> list[Verdict]:
    """Keys and shapes; the file's sha256 among the official ones; its own hash of tensors; every value finite."""
    checkpoint = open_checkpoint(path, variant)  # strict: raises where keys or shapes do not fit
    dtypes_of(checkpoint)  # and here where a dtype cannot be read
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
            if not is_finite(get(key)):
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
    """A tensor of two checkpoints: largest difference, and the L2 distance relative to the first.

    NaN or infinite where only one of the two holds such values.
    """

    key: str
    largest: float
    relative: float


def difference(key: str, x: Tensor, y: Tensor) -> Difference | None:
    """None where dtypes and values are the same, NaN where the other is NaN included."""
    if x.dtype == y.dtype and torch.equal(x, y):
        return None
    first, second = x.double(), y.double()
    same = (first == second) | (first.isnan() & second.isnan())
    if x.dtype == y.dtype and same.all():
        return None
    change = torch.where(same, 0, second - first).abs()
    return Difference(key, float(change.max()), float(change.norm() / first.norm().clamp_min(1e-300)))


def furthest(each: Difference) -> tuple[bool, float]:
    """Orders what differs: first what is not finite, then from the largest distance down."""
    return math.isfinite(each.relative), -each.relative


def diff(first: Path, second: Path, variant: str | None = None) -> Json:
    """Keys that only one has, shapes that differ, and values that differ, in official names whatever the layouts."""
    a, b = open_checkpoint(first, variant), open_checkpoint(second, variant)
    if a.config.kind != b.config.kind:
        raise InputError(f"{first} is a {a.config.kind}, {second} a {b.config.kind}: they have no tensors to compare")
    common = sorted(a.shapes.keys() & b.shapes.keys())
    shapes = [key for key in common if a.shapes[key] != b.shapes[key]]
    dtypes = dtypes_of(a), dtypes_of(b)
    same_shape = [key for key in common if key not in shapes]
    found = []
    with a.reader() as read_a, b.reader() as read_b:
        for key in same_shape:
            if each := difference(key, read_a(key), read_b(key)):
                found.append(each)
    return {
        "only in the first": sorted(a.shapes.keys() - b.shapes.keys()),
        "only in the second": sorted(b.shapes.keys() - a.shapes.keys()),
        "of another shape": shapes,
        "of another dtype": [key for key in common if dtypes[0][key] != dtypes[1][key]],
        "equal": len(same_shape) - len(found),
        "different": [asdict(each) for each in sorted(found, key=furthest)],
    }
