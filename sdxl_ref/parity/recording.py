"""Record a run: `with parity.record(pipe, points="unet/**", path="trace.safetensors"):` around any call."""

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref import __version__
from sdxl_ref.config import InputError
from sdxl_ref.parity.sketch import sketch
from sdxl_ref.parity.trace import Key, Trace, matches
from sdxl_ref.parity.watching import watched


class Recorder:
    """Keeps what it is shown of the points of a selection; tensors, or their sketches."""

    def __init__(
        self,
        points: Any = "**",
        sketched: Callable[[Key, Tensor], bool] = lambda key, tensor: False,
        keeps: Callable[[Key], bool] = lambda key: True,
        widest: torch.dtype = torch.float64,
    ) -> None:
        self.trace = Trace()
        self.points = points
        self.sketched = sketched
        self.keeps = keeps
        self.widest = widest  # what is wider is kept in it
        self._chosen: dict[str, bool] = {}  # of each point
        self._latest: dict[int, tuple[Tensor, int, Key]] = {}  # by id: what is kept of a tensor, at which version

    def enters(self, point: str) -> None:
        pass

    def leaves(self, point: str) -> None:
        pass

    def handed(self, key: Key, value: Tensor) -> Tensor:
        if self._is_chosen(key):
            known = self._known(value)
            if known is None:
                self._keep(key, value)
            else:
                self.trace.same[key] = known
        return value

    def returned(self, key: Key, value: Tensor) -> Tensor:
        if self._is_chosen(key):
            known = self._known(value)
            if known is None or self.trace.get(known) is None:
                self._keep(key, value)
            else:  # of a module that returns what its last one did
                self.trace.values[key] = self.trace.get(known)  # type: ignore[assignment]
        return value

    def _known(self, value: Tensor) -> Key | None:
        """The key under which these very numbers are kept already."""
        tensor, version, key = self._latest.get(id(value), (None, 0, None))
        return key if tensor is value and version == version_of(value) else None

    def _is_chosen(self, key: Key) -> bool:
        if key.point not in self._chosen:
            self._chosen[key.point] = matches(key.point, self.points)
        return self._chosen[key.point] and self.keeps(key)

    def _keep(self, key: Key, value: Tensor) -> None:
        kept = value.detach()
        if kept.dtype == torch.float64:
            kept = kept.to(self.widest)
        self.trace.values[key] = sketch(kept) if self.sketched(key, kept) else kept.to("cpu", copy=True)
        self._latest[id(value)] = (value, version_of(value), key)
        while len(self._latest) > 8:  # an input is a recent output, and what is held here is not freed
            self._latest.pop(next(iter(self._latest)))


def version_of(value: Tensor) -> int:
    """What counts up where a tensor is written to."""
    return 0 if value.is_inference() else value._version


@contextmanager
def record(
    pipe: Any, points: Any = "**", path: Path | str | None = None, sketch: bool = False, **settings: Any
) -> Iterator[Trace]:
    """Record what a pipeline computes in this block, and write it to `path` when the block ends.

    `points` selects by glob, or by several: see `watching` for the names. `sketch` keeps a count sketch of each tensor
    instead of the tensor. `settings` go into the trace. The run is the same to the bit; but packed blocks, which
    compute several modules at once, compute one after the other while they are watched. Of a run that fails, what
    there is is written. InputError before it where the file cannot be written.
    """
    recorder = Recorder(points, lambda key, tensor: sketch)
    recorder.trace.settings |= settings | machine() | models_of(pipe)
    with written(recorder.trace, path), watched(pipe, recorder):
        yield recorder.trace
    if not recorder.trace.values:
        warnings.warn(f"nothing was recorded: no point of the run is {points}", stacklevel=3)


@contextmanager
def written(trace: Trace, path: Path | str | None) -> Iterator[None]:
    """Write a trace when the block ends, also where it fails; not where there is nothing. InputError before it."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: expected a file name in an existing folder")
    try:
        yield
    except Exception as error:
        trace.settings["stopped"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if path is not None and (trace.values or "stopped" not in trace.settings):
            trace.save(path)


def machine() -> dict[str, Any]:
    versions = {"sdxl_ref": __version__, "torch": torch.__version__, "python": platform.python_version()}
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"versions": versions, "machine": f"{platform.machine()}, {cpu}", "threads": torch.get_num_threads()}


def models_of(pipe: Any) -> dict[str, Any]:
    """Which files the models are of, in which dtype and where."""
    models = [model.checkpoint for model in pipe.models() if model.checkpoint is not None]
    dtypes = {"dtype": str(pipe.dtype).removeprefix("torch."), "device": str(pipe.device)}
    return dtypes | {"checkpoints": [{"file": checkpoint.path.name} for checkpoint in models]}
