"""A trace: the numbers of a run under official names, in the order in which they were complete. FORMAT.md says more.

A key is a point, perhaps of a later call, perhaps one of its inputs or further outputs:

    unet/middle_block.1            what the module returned, in the first evaluation
    unet/middle_block.1#2          in the third one
    unet/middle_block.1:in.0       what it was handed first
    text_encoder_2:out.1           the second thing that it returned
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.parity.sketch import Sketch
from sdxl_ref.weights.saving import replacing

VERSION = 1
METADATA = "sdxl_ref.parity"
SKETCH = ":sketch"
KEY = re.compile(r"(?P<point>[^#:]+)(#(?P<call>\d+))?(:(?P<value>(in|out)\.\d+))?")


class Key(NamedTuple):
    """One tensor of a trace. `value` is "out.0" for what a point is named by."""

    point: str
    call: int = 0
    value: str = "out.0"

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        return f"{self.point}{call}" + ("" if self.value == "out.0" else f":{self.value}")

    @classmethod
    def parse(cls, text: str) -> "Key":
        """InputError for what is no key."""
        match = KEY.fullmatch(text)
        if match is None:
            raise InputError(f"expected a name such as unet/middle_block.1#2:in.0 in a trace, found {text!r}")
        return cls(match["point"], int(match["call"] or 0), match["value"] or "out.0")

    @property
    def is_output(self) -> bool:
        return self.value.startswith("out")


@dataclass
class Trace:
    """Tensors, or sketches of them, by key; in order. `settings` are JSON: of the run, the model, the machine.

    `same` are inputs that are the very numbers of another key, kept once.
    """

    values: dict[Key, Tensor | Sketch] = field(default_factory=dict)
    same: dict[Key, Key] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __contains__(self, key: Key) -> bool:
        return key in self.values or key in self.same

    def get(self, key: Key) -> Tensor | Sketch | None:
        return self.values.get(self.same.get(key, key))

    def tensor(self, key: Key) -> Tensor | None:
        """The numbers themselves, where they are there."""
        value = self.get(key)
        return value if isinstance(value, Tensor) else None

    def outputs(self) -> Iterator[Key]:
        """In the order of completion."""
        return (key for key in self.values if key.is_output)

    def points(self) -> list[str]:
        return list(dict.fromkeys(key.point for key in self.values))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, never half of one."""
        tensors: dict[str, Tensor] = {}
        sketches: dict[str, Any] = {}
        seen: set[int] = set()
        for key, value in self.values.items():
            if isinstance(value, Sketch):
                tensors[f"{key}{SKETCH}"] = value.sums.clone()
                sketches[str(key)] = value.figures
            else:
                is_second = value.data_ptr() in seen  # of a module that returns what its last one did
                seen.add(value.data_ptr())
                whole = value.contiguous()
                tensors[str(key)] = whole.clone() if is_second else whole
        header = {"version": VERSION, "order": [str(key) for key in self.values]}
        header |= {"same": {str(key): str(other) for key, other in self.same.items()}}
        header |= {"sketches": sketches, "settings": self.settings}
        with replacing(Path(path)) as beside:
            save_file(tensors, beside, {METADATA: json.dumps(header)})

    @classmethod
    def load(cls, path: Path | str) -> "Trace":
        """A file that `save` wrote, or a folder of `.npy` files named by key. InputError where it is neither."""
        if Path(path).is_dir():
            return cls.of_folder(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(METADATA, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is no trace, or not a whole one: {error}") from error
        for name, tensor in tensors.items():
            check_dtype(path, name, tensor)
        if header is None:  # another tool's: names alone say what is what
            return cls({Key.parse(name): tensor for name, tensor in tensors.items()})
        version = header.get("version") if isinstance(header, dict) else None
        if version != VERSION:
            raise InputError(f"{path} is a trace of version {version}, expected {VERSION}: record it anew")
        try:
            return cls.of_header(tensors, header)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} has metadata that FORMAT.md does not know: {error!r:.100}") from error

    @classmethod
    def of_header(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "Trace":
        values: dict[Key, Tensor | Sketch] = {}
        for name in header["order"]:
            if name in header["sketches"]:
                values[Key.parse(name)] = Sketch.of_figures(tensors[name + SKETCH], header["sketches"][name])
            else:
                values[Key.parse(name)] = tensors[name]
        same = {Key.parse(key): Key.parse(other) for key, other in header["same"].items()}
        return cls(values, {key: other for key, other in same.items() if other in values}, dict(header["settings"]))

    @classmethod
    def of_folder(cls, folder: Path) -> "Trace":
        """`unet/middle_block.1#2.npy`, in folders or with `/` written as `__`."""
        values: dict[Key, Tensor | Sketch] = {}
        for file in sorted(folder.rglob("*.npy")):
            key = Key.parse(file.relative_to(folder).as_posix().removesuffix(".npy").replace("__", "/"))
            if key in values:
                raise InputError(f"{folder} has two files for {key}: leave one")
            try:
                values[key] = torch.from_numpy(np.load(file, allow_pickle=False))
            except Exception as error:  # numpy's parser of headers raises of many kinds, MemoryError for large sizes
                raise InputError(f"{file} is no array that can be read: {error}") from error
            check_dtype(folder, str(key), values[key])  # type: ignore[arg-type]
        if not values:
            raise InputError(f"{folder} has no .npy files: expected one for each point, named by it")
        return cls(values)

    def channels_first(self) -> "Trace":
        """Of another tool's channels-last maps (b,h,w,c)."""
        turned = {
            k: v.permute(0, 3, 1, 2) if isinstance(v, Tensor) and v.ndim == 4 else v for k, v in self.values.items()
        }
        return Trace(turned, self.same, self.settings)

    def in_batches_of(self, reference: "Trace") -> "Trace":
        """With several calls of a smaller batch joined, where the reference has one: a prompt after the other, say."""
        joined: dict[Key, Tensor | Sketch] = {}
        for key, value in self.values.items():
            first = key._replace(call=0)
            if first not in reference:
                first = first._replace(value="out.0")
            expected, mine = reference.get(first), self.get(first)
            count = batch(expected) // max(1, batch(mine)) if expected is not None and mine is not None else 1
            if count <= 1 or not isinstance(value, Tensor) or not value.ndim:
                joined[key] = value
            elif key.call % count == 0:
                parts = [self.tensor(key._replace(call=key.call + i)) for i in range(count)]
                whole = all(isinstance(part, Tensor) and part.shape == value.shape for part in parts)
                joined[key._replace(call=key.call // count)] = torch.cat(parts) if whole else value  # type: ignore[arg-type]
        return Trace(joined, self.same, self.settings)

    def renamed(self, names: dict[str, str]) -> "Trace":
        """With other names for points; a name that is not in the table stays. InputError for two of one name."""

        def key_of(key: Key) -> Key:
            return key._replace(point=names.get(key.point, key.point))

        values = {key_of(key): value for key, value in self.values.items()}
        if len(values) < len(self.values):
            twice = next(key for key in values if [*map(key_of, self.values)].count(key) > 1)
            raise InputError(f"two names of the trace would be {twice}: rename one of them otherwise")
        same = {key_of(key): key_of(other) for key, other in self.same.items()}
        return Trace(values, same, self.settings)


def check_dtype(path: Path | str, name: str, tensor: Tensor) -> None:
    """InputError for numbers that cannot be compared: complex ones, and those of less than 16 bits."""
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{path}: {name} is {kind}: expected float16, bfloat16, float32, float64 or whole numbers")


def batch(value: Tensor | Sketch) -> int:
    return value.shape[0] if len(value.shape) else 1


def matches(point: str, globs: str | Iterable[str]) -> bool:
    """Whether a point is of a selection: `*` is anything without a slash, `**` anything; `unet/**` is `unet` too."""
    for glob in [globs] if isinstance(globs, str) else globs:
        escaped = re.escape(glob).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        if re.fullmatch(escaped, point) or (glob.endswith("/**") and matches(point, glob[:-3])):
            return True
    return False
