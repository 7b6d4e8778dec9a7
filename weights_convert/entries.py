"""What every conversion shares: tensors to be written, a file written of them, a bar of progress, a report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.layouts import Rule
from sdxl_ref.weights.streaming import Entry, total, write_file
from weights_convert.targets import check_target, writing_file

Read = Callable[[str], Tensor]


@dataclass
class Report:
    """What a conversion did, in words."""

    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def entry(name: str, dtype: torch.dtype, shape: Iterable[int], read: Read) -> Entry:
    """A tensor to be written under the name by which it is read."""
    return Entry(name, dtype, tuple(shape), partial(read, name))


def part_entries(
    rules: Mapping[str, Rule], checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], read: Read
) -> list[Entry]:
    """The tensors of a part under diffusers' names; q, k and v of a stacked projection are read one at a time."""
    entries = []
    for key, rule in rules.items():
        whole = torch.empty(checkpoint.shapes[key], device="meta")
        for i, (name, piece) in enumerate(zip(rule.other, rule.split(whole), strict=True)):
            entries.append(Entry(name, dtypes[key], tuple(piece.shape), partial(read_piece, read, key, rule, i)))
    return sorted(entries, key=attrgetter("name"))


def read_piece(read: Read, key: str, rule: Rule, index: int) -> Tensor:
    """One of the tensors that an official one is in the other layout."""
    return rule.split(read(key))[index]


@contextmanager
def progress_bar(entries: Iterable[Entry]) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of bytes that were written; nothing is shown where there is no terminal."""
    with tqdm(total=total(entries), unit="B", unit_scale=True, disable=None) as progress:
        yield progress.update


def save(target: Path, entries: Sequence[Entry], metadata: Mapping[str, str], force: bool) -> str:
    """Write one file where `check_target` allows it, whole or not at all; returns the sha256 of its tensors."""
    check_target(target, total(entries), force)
    with writing_file(target, force) as new, progress_bar(entries) as progress:
        digest = write_file(new, entries, metadata, progress)
    return digest


def lines_on_the_rest(target: Path, extras: Sequence[Entry], kept: Sequence[str]) -> list[str]:
    """What a report says of tensors that a folder's layout has no place for, and of what stayed in the folder."""
    lines = []
    if extras:
        names = ", ".join(extra.name for extra in extras)
        lines.append(f"{EXTRAS_FILE}: {names}, which the layout has no place for")
    if kept:
        lines.append(f"kept in {target}: {', '.join(kept)}, which the layout does not name")
    return lines
