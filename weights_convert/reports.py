"""Whether a file or folder is whole and genuine, and how two differ."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import KNOWN_FILES, Checkpoint
from sdxl_ref.weights.dtypes import is_finite
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.report import HEADER_LENGTH, dtypes_of
from sdxl_ref.weights.tensor_files import sha256_of
from weights_convert.stream import HASH_KEY

Json = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A check by name, whether it holds, and what was found."""

    check: str
    holds: bool
    found: str


def verify(path: Path, variant: str | None = None) -> list[Verdict]:
    """Keys and shapes; the file's sha256 among the official ones; its own hash of tensors; every value finite.

    InputError where keys or shapes do not fit, or a dtype cannot be read.
    """
    checkpoint = open_checkpoint(path, variant=variant)
    dtypes_of(checkpoint)
    verdicts = [
        Verdict("keys and shapes", True, f"{len(checkpoint.shapes)} tensors of an SDXL {checkpoint.config.kind}")
    ]
    if checkpoint.path.is_file():
        verdicts.append(known_file(checkpoint))
        verdicts += own_hash(checkpoint)
    return [*verdicts, finite_values(checkpoint)]


def known_file(checkpoint: Checkpoint) -> Verdict:
    """The sha256 of a file, and which official one has it; one that is of none may be as good."""
    digest = checkpoint.sha256()
    if digest not in KNOWN_FILES:
        return Verdict("sha256", True, f"{digest}: of no official file")
    name, vae = KNOWN_FILES[digest]
    return Verdict("sha256", True, f"{digest}: {name}.safetensors, VAE {vae}")


def own_hash(checkpoint: Checkpoint) -> list[Verdict]:
    """The hash of all tensors that a file's metadata may carry (ModelSpec), against its tensors."""
    claimed = checkpoint.metadata.get(HASH_KEY)
    if claimed is None:
        return []
    with checkpoint.path.open("rb") as file:
        header = int.from_bytes(file.read(HEADER_LENGTH), "little")
    actual = f"0x{sha256_of(checkpoint.path, start=HEADER_LENGTH + header)}"
    if actual == claimed:
        return [Verdict("ModelSpec hash", True, actual)]
    return [Verdict("ModelSpec hash", False, f"{actual}, but it says {claimed}")]


def finite_values(checkpoint: Checkpoint) -> Verdict:
    """Whether no tensor holds NaN or infinity; the first that do by name."""
    with checkpoint.reader() as read:
        not_finite = [key for key in sorted(checkpoint.shapes) if not is_finite(read(key))]
    if not not_finite:
        return Verdict("finite values", True, "all")
    names = ", ".join(not_finite[:3])
    return Verdict("finite values", False, f"{len(not_finite)} tensors hold NaN or infinity: {names}")


@dataclass(frozen=True)
class Difference:
    """A tensor of two checkpoints: largest difference, and the L2 distance relative to the first.

    NaN or infinite where only one of the two holds such values.
    """

    key: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """How many tensors of two checkpoints are equal, which differ, and the names that have no match, by the reason."""

    mismatches: Mapping[str, list[str]]
    equal: int
    different: list[Difference]  # those first whose distance is not finite, then from the largest down

    def is_same(self) -> bool:
        return not self.different and not any(self.mismatches.values())

    def to_json(self) -> Json:
        different = [asdict(difference) for difference in self.different]
        return {**self.mismatches, "equal": self.equal, "different": different}


def diff(first: Path, second: Path, variant: str | None = None) -> Comparison:
    """Keys that only one has, shapes that differ, and values that differ, in official names whatever the layouts."""
    a = open_checkpoint(first, variant=variant)
    b = open_checkpoint(second, variant=variant)
    if a.config.kind != b.config.kind:
        raise InputError(f"{first} is a {a.config.kind}, {second} a {b.config.kind}: they have no tensors to compare")
    dtypes_a = dtypes_of(a)
    dtypes_b = dtypes_of(b)
    common = sorted(a.shapes.keys() & b.shapes.keys())
    mismatches = {
        "only in the first": sorted(a.shapes.keys() - b.shapes.keys()),
        "only in the second": sorted(b.shapes.keys() - a.shapes.keys()),
        "of another shape": [key for key in common if a.shapes[key] != b.shapes[key]],
        "of another dtype": [key for key in common if dtypes_a[key] != dtypes_b[key]],
    }
    comparable = [key for key in common if a.shapes[key] == b.shapes[key]]
    with a.reader() as read_a, b.reader() as read_b:
        differences = [difference(key, read_a(key), read_b(key)) for key in comparable]
    different = [d for d in differences if d is not None]
    return Comparison(mismatches, len(comparable) - len(different), sorted(different, key=by_distance))


def difference(key: str, x: Tensor, y: Tensor) -> Difference | None:
    """None where dtypes and values are the same, NaN where the other is NaN included."""
    if x.dtype == y.dtype and torch.equal(x, y):
        return None
    first = x.double()
    second = y.double()
    same = (first == second) | (first.isnan() & second.isnan())
    if x.dtype == y.dtype and same.all():
        return None
    change = torch.where(same, 0, second - first).abs()
    return Difference(key, float(change.max()), float(change.norm() / first.norm().clamp_min(1e-300)))


def by_distance(difference: Difference) -> tuple[bool, float]:
    """Orders what differs: first what is not finite, then from the largest distance down."""
    return math.isfinite(difference.relative), -difference.relative
