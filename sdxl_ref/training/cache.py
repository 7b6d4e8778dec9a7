"""A cache of tensors on the disk: rows under the hash of what they were made from, many rows to a file."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.tensor_files import open_tensors, read_metadata

ROWS = 64  # of a shard, at most
VERSION = 2  # raised whenever the same picture, caption and weights give other rows: older shards are made again
HASH_GLOB = "[0-9a-f]" * 16  # in a shard's name


class Row(NamedTuple):
    """Tensors to cache, and the facts that they were made from, with their `key`."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.tensors.values()]


@dataclass(frozen=True)
class Entry:
    """Where a cached row is, and what it was made from."""

    path: Path
    index: int
    facts: Mapping[str, Any]


def key_of(*sources: object) -> str:
    """The key of a row that is made from these sources, all of them JSON."""
    return hashlib.sha256(json.dumps([VERSION, *sources]).encode()).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """sha256 over a network's configuration and its tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(repr(getattr(module, "config", None)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Shards:
    """Rows by their key, in files `KIND-*.safetensors` of a folder: at most ROWS of one shape in each.

    The name of a file comes from the keys in it; its metadata hold the facts of each row, of which the key is the
    hash. A file that was cut short counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old_files = sorted(filter(Path.is_file, folder.glob(f"*-{HASH_GLOB}.safetensors")))
        self.entries: dict[str, Entry] = {}
        for path in self.old_files:
            try:
                self._register(path, json.loads(read_metadata(path)["rows"]))
            except (ValueError, KeyError, TypeError):  # InputError, which is a ValueError, for a file that is not whole
                continue

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def facts(self, key: str) -> Mapping[str, Any]:
        """What a row was made from."""
        return self.entries[key].facts

    def fill(self, kind: str, rows: Iterable[Row]) -> None:
        """Write rows as they come. What has been computed is written even if an error or the user ends it."""
        pending: list[Row] = []
        try:
            for row in rows:
                if pending and (len(pending) == ROWS or row.shapes != pending[0].shapes):
                    self._write(kind, pending)
                    pending = []
                pending.append(row)
        finally:
            if pending:
                self._write(kind, pending)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of rows of one shape, by name, stacked (b,...). InputError where a shard cannot be read."""
        rows: list[dict[str, Tensor]] = []
        try:
            for key in keys:
                entry = self.entries[key]
                with open_tensors(entry.path) as file:
                    rows.append({name: file.get_slice(name)[entry.index] for name in file.keys()})  # noqa: SIM118
        except InputError as error:
            raise InputError(f"could not read the cache in {self.folder}, start again to mend it: {error}") from error
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # (...) -> (b,...)

    def clean(self, kind: str, used_keys: Iterable[str]) -> None:
        """Delete the files of a kind that were there at first and hold none of the used rows."""
        used_files = {self.entries[key].path for key in used_keys}
        for path in self.old_files:
            if path.name.startswith(f"{kind}-") and path not in used_files:
                path.unlink(missing_ok=True)

    def _write(self, kind: str, rows: Sequence[Row]) -> None:
        """Write a shard of rows of one shape."""
        facts = [row.facts for row in rows]
        digest = key_of([row_facts["key"] for row_facts in facts])[:16]
        path = self.folder / f"{kind}-{digest}.safetensors"
        tensors = {
            name: torch.stack([row.tensors[name] for row in rows])  # (...) -> (rows,...)
            for name in rows[0].tensors
        }
        write_tensors(path, tensors, {"rows": json.dumps(facts)})
        self._register(path, facts)

    def _register(self, path: Path, facts: Sequence[Mapping[str, Any]]) -> None:
        """Note where the rows of a shard are; all of them or, where facts are damaged, none."""
        self.entries |= {row_facts["key"]: Entry(path, index, row_facts) for index, row_facts in enumerate(facts)}
