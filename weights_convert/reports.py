"""Whether a file or folder is whole and genuine, and how two differ."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.adapters.report import adapter_file
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.dtypes import DTYPE_NAMES, is_finite
from sdxl_ref.weights.identity import KNOWN_FILES
from sdxl_ref.weights.lone_parts import find_lone_part, open_part
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.report import HEADER_LENGTH, dtypes_of
from sdxl_ref.weights.streaming import HASH_KEY
from sdxl_ref.weights.tensor_files import sha256_of

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
    lone = find_lone_part(path, variant) if os.path.exists(path) else None
    checkpoint = open_part(lone) if lone else open_checkpoint(path, variant=variant)
    dtypes_of(checkpoint)
    what = lone.name if lone else f"an SDXL {checkpoint.config.kind}"
    verdicts = [Verdict("keys and shapes", True, f"{len(checkpoint.shapes)} tensors of {what}")]
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
    """A tensor whose values differ: the largest difference, and the L2 distance relative to the first.

    NaN or infinite where only one of the two holds such values.
    """

    key: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, tensor by tensor.

    `mismatches`: names that have no match, by the reason. `dtype_alone`: those of the same values in another dtype,
    exactly or rounded to it, by both dtypes. `equal`: how many are the same bit for bit. `different`: first those whose
    distance is not finite, then from the largest down.
    """

    mismatches: Mapping[str, list[str]]
    dtype_alone: Mapping[str, list[str]]
    equal: int
    different: list[Difference]

    def is_same(self) -> bool:
        return not self.different and not any(self.mismatches.values())

    def to_json(self) -> Json:
        different = [asdict(difference) for difference in self.different]
        return {
            **self.mismatches,
            "of another dtype alone": self.dtype_alone,
            "equal": self.equal,
            "different": different,
        }


def diff(first: Path, second: Path, variant: str | None = None) -> Comparison:
    """Keys that only one has, shapes and dtypes that differ, and values that differ, in official names.

    Either may be one part of a model alone, and then both have to be. "pocket" is that of the other one's kind.
    """
    a, b = both(first, second, variant)
    dtypes_a = dtypes_of(a)
    dtypes_b = dtypes_of(b)
    common = sorted(a.shapes.keys() & b.shapes.keys())
    mismatches = {
        "only in the first": sorted(a.shapes.keys() - b.shapes.keys()),
        "only in the second": sorted(b.shapes.keys() - a.shapes.keys()),
        "of another shape": [key for key in common if a.shapes[key] != b.shapes[key]],
        "of another dtype": [key for key in common if dtypes_a[key] != dtypes_b[key]],
    }
    dtype_alone: dict[str, list[str]] = {}
    different = []
    equal = 0
    with a.reader() as read_a, b.reader() as read_b:
        for key in (key for key in common if a.shapes[key] == b.shapes[key]):
            found, how = compared(key, read_a(key), read_b(key))
            if found is not None:
                different.append(found)
            elif how is None:
                equal += 1
            else:
                dtypes = f"{DTYPE_NAMES[dtypes_a[key]]} → {DTYPE_NAMES[dtypes_b[key]]}, {how}"
                dtype_alone.setdefault(dtypes, []).append(key)
    return Comparison(mismatches, dtype_alone, equal, sorted(different, key=by_distance))


def both(first: Path, second: Path, variant: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Two whole models of one kind, or the same part of two. InputError where they have no tensors to compare."""
    for path in (first, second):
        refuse_adapter(path)
    alone = [find_lone_part(path, variant) if os.path.exists(path) else None for path in (first, second)]
    kinds = [part.name if part else "a whole model" for part in alone]
    if kinds[0] != kinds[1]:
        raise InputError(f"{first} is {kinds[0]}, {second} {kinds[1]}: they have no tensors to compare")
    if alone[0] and alone[1]:
        return open_part(alone[0]), open_part(alone[1])
    if str(first) == "pocket":
        b = open_checkpoint(second, variant=variant)
        a = open_checkpoint(first, b.config.kind)
    else:
        a = open_checkpoint(first, variant=variant)
        b = open_checkpoint(second, a.config.kind, variant=variant)
    if a.config.kind != b.config.kind:
        raise InputError(f"{first} is a {a.config.kind}, {second} a {b.config.kind}: they have no tensors to compare")
    return a, b


def refuse_adapter(path: Path) -> None:
    """InputError for an adapter, whose tensors are only comparable on the weights of a model."""
    if os.path.exists(path) and adapter_file(path):
        remedy = "put each on the same model with `weights-convert lora merge`, and compare these models"
        looking = "or see what each is with `weights-convert inspect`"
        raise InputError(f"expected two models, found an adapter (LoRA), {path}: {remedy}, {looking}")


def compared(key: str, x: Tensor, y: Tensor) -> tuple[Difference | None, str | None]:
    """How two tensors differ in values; or, where they do so in dtype alone, whether one of them was rounded.

    Both are None where all is the same. NaN counts as the same where the other is NaN.
    """
    found = difference(key, x, y)
    if x.dtype == y.dtype:
        return found, None
    if found is None:
        return None, "the same values"
    are_numbers = x.is_floating_point() and y.is_floating_point()
    if are_numbers and (difference(key, x.to(y.dtype), y) is None or difference(key, x, y.to(x.dtype)) is None):
        return None, "rounded"
    return found, None


def difference(key: str, x: Tensor, y: Tensor) -> Difference | None:
    """How the values of two tensors differ, whatever their dtypes; None where they are the same, NaN included."""
    if x.dtype == y.dtype and torch.equal(x, y):
        return None
    first = x.double()
    second = y.double()
    same = (first == second) | (first.isnan() & second.isnan())
    if same.all():
        return None
    change = torch.where(same, 0, second - first).abs()
    return Difference(key, float(change.max()), float(change.norm() / first.norm().clamp_min(1e-300)))


def by_distance(difference: Difference) -> tuple[bool, float]:
    """Orders what differs: first what is not finite, then from the largest distance down."""
    return math.isfinite(difference.relative), -difference.relative
