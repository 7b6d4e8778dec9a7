"""The training loop: AdamW with warm-up and cosine, clipping, EMA, autocast; a log; stop and go on.

Nothing in it knows what is trained: it is handed a module and a function `loss_of(step, generator)`. Whatever is
drawn at a step comes from that step's own generator, so that a run that was stopped and goes on is, on the CPU, equal
bit for bit to one that was not. Under torch.distributed every process makes the same steps; the first one writes.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.saving import clear, replacing, write

if sys.platform != "win32":
    import fcntl

STATE, LOG = "state.safetensors", "log.csv"
COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "seconds")
Loss = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes. Two runs with equal settings and data are equal."""

    steps: int
    learning_rate: float
    warm_up: int = 200  # steps over which the rate rises from 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of all gradients together
    ema: float = 0.999  # decay of the averaged weights; 0: none are kept
    autocast: str = ""  # "bfloat16": matrix products in it; "": everything in the weights' dtype
    seed: int = 0
    accumulate: int = 1  # batches whose gradients are averaged for one step

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulate", 1), ("warm_up", 0), ("learning_rate", 0), ("weight_decay", 0)):
            if not least <= (value := getattr(self, name)) <= 1e9:
                raise InputError(f"{name.replace('_', ' ')} must be a number from {least} to 1e9, found {value}")
        if not 0 <= self.ema < 1:
            raise InputError(f"the decay of the averaged weights must be at least 0 and below 1, found {self.ema}")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to 0 (Loshchilov & Hutter, arXiv:1608.03983)."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """A module in training, in a folder of its own: `state.safetensors` to go on from, `log.csv` to look at.

    `about` names what is trained on what; with the settings it has to be that of the run that the folder holds, else
    InputError. The averaged weights are in `averaged`, by parameter name. With several processes `replicas` is what
    averages their gradients: `loss_of` calls it.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        folder: Path,
        about: dict[str, object],
        replicas: DistributedDataParallel | None = None,
    ) -> None:
        self.module, self.settings, self.folder, self.replicas = module, settings, folder, replicas
        self.leads = not distributed.is_initialized() or distributed.get_rank() == 0
        self.identity = json.loads(json.dumps({"settings": asdict(settings), **about}))
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.weights:
            raise InputError("nothing to train: no parameter of the module requires a gradient")
        self.averaged = {name: at_least_float32(p.detach().clone()) for name, p in self.weights.items() if settings.ema}
        options = {"betas": settings.betas, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.AdamW(self.weights.values(), settings.learning_rate, **options)  # type: ignore[arg-type]
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if held := (folder / STATE).exists():
            self._go_on()
        self.whole = True  # False while a step changes the weights
        if self.leads:
            self._cut_log()
            clear(folder)
            if not held:
                self.save()  # from now on the folder is this run's, and there is room for it

    def train(self, loss_of: Loss, save_every: int = 1000, stop: int | None = None) -> Iterator[int]:
        """Go on to the end, or to step `stop`; yields the number of steps done after each, for samples or for a look.

        Saves every `save_every` steps, at the end, and when it is stopped: SIGINT and SIGTERM let the step end, then
        KeyboardInterrupt is raised.
        """
        last = self.settings.steps if stop is None else min(stop, self.settings.steps)
        began = time.perf_counter()
        hidden = None if self.leads else True
        bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=hidden)
        with bar, (self.folder / LOG).open("a", newline="") as log, told_to_stop() as told:
            rows = csv.writer(log)
            try:
                while self.step < last:
                    loss, norm, rate = self._advance(loss_of, told)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update()
                    seconds = time.perf_counter() - began
                    if self.leads:
                        rows.writerow((self.step, f"{loss:.6g}", f"{norm:.4g}", f"{rate:.4g}", f"{seconds:.2f}"))
                        log.flush()
                    if told:
                        raise KeyboardInterrupt
                    if self.step % save_every == 0 and self.step < last:
                        self.save()
                    yield self.step
            finally:
                if self.whole:
                    self.save()

    def _advance(self, loss_of: Loss, told: list[int]) -> tuple[float, float, float]:
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + self.step) % 2**64)
        device = next(iter(self.weights.values())).device
        total = torch.zeros((), device=device)
        for i in range(s.accumulate):
            apart = self.replicas is not None and i < s.accumulate - 1  # gradients are averaged with the last batch
            with self.replicas.no_sync() if apart and self.replicas else nullcontext():
                with torch.autocast(device.type, getattr(torch, s.autocast or "bfloat16"), enabled=bool(s.autocast)):
                    loss = loss_of(self.step, generator) / s.accumulate
                loss.backward()
            total += loss.detach()
        value = self._agree(total, told)
        norm = float(nn.utils.clip_grad_norm_(self.weights.values(), s.clip))
        for what, number in (("loss", value), ("gradients' norm", norm)):
            if not math.isfinite(number):
                remedy = f"use a lower learning rate (it is {s.learning_rate}), in another folder"
                if self.step == 0:
                    remedy = "no step was made yet, so the weights or the data are to blame: look at both"
                raise InputError(f"the {what} is {number} at step {self.step}: {remedy}")
        rate = s.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(s.ema, (1 + self.step) / (10 + self.step))  # little memory of the first steps
        with torch.no_grad():
            for name, average in self.averaged.items():
                average.lerp_(self.weights[name].to(average.dtype), 1 - decay)
        self.whole = True
        return value, norm, rate

    def _agree(self, loss: Tensor, told: list[int]) -> float:
        """The mean loss of all processes; and if one is told to stop, all are."""
        if distributed.is_initialized():
            both = torch.stack([loss / distributed.get_world_size(), torch.full_like(loss, len(told))])
            distributed.all_reduce(both)
            if both[1] and not told:
                told.append(signal.SIGTERM)
            return float(both[0])
        return float(loss)

    def save(self) -> None:
        """Weights, averaged weights and the optimizer's moments; written beside and renamed."""
        if not self.leads:
            return
        state = {f"weights.{name}": p.detach() for name, p in self.weights.items()}
        state |= {f"averaged.{name}": tensor for name, tensor in self.averaged.items()}
        for name, p in self.weights.items():
            moments = self.optimizer.state.get(p, {})
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        state = {key: tensor.contiguous() for key, tensor in state.items()}
        write(self.folder / STATE, state, {"step": str(self.step), "identity": json.dumps(self.identity)})

    def _go_on(self) -> None:
        path = self.folder / STATE
        metadata = check_same(self.folder, self.identity)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            weights = {key.removeprefix("weights.") for key in names if key.startswith("weights.")}
            if weights != self.weights.keys():
                differing = sorted(weights ^ self.weights.keys())[:3]
                raise InputError(f"{path} is of another model (differs in {', '.join(differing)}): use another folder")
            self.step = int(metadata["step"])
            with torch.no_grad():
                for name, p in self.weights.items():
                    p.copy_(file.get_tensor(f"weights.{name}"))
                    if name in self.averaged:
                        self.averaged[name].copy_(file.get_tensor(f"averaged.{name}"))
                    if f"exp_avg.{name}" in names:  # not where no gradient came
                        moments = {
                            key: file.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")
                        }
                        self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def _cut_log(self) -> None:
        """Keep the rows up to the step that the state stands at: those after it are computed again."""
        path = self.folder / LOG
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            rows = list(csv.reader(text.splitlines()))
        except (OSError, csv.Error) as error:
            raise InputError(f"could not read the log of the run, {path} ({error}): move it away") from error
        if rows[:1] not in ([], [list(COLUMNS)]):
            expected = f"expected a log of a run, whose first line is {','.join(COLUMNS)}"
            raise InputError(f"{expected}, found {','.join(rows[0])[:60]!r} in {path}: move it, or use another folder")
        kept = [row for row in rows if row and row[0].isdecimal() and int(row[0]) <= self.step]
        if rows != [list(COLUMNS), *kept]:
            with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *kept])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process works in a folder meanwhile; InputError where one does. Ends with the process, however it ends.

    A file system that has no locks (and Windows) is trusted.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"could not write to the folder {folder}: {error.strerror}") from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another run is at work in {folder}: wait for its end, or use another folder"
                ) from error
            except OSError:
                pass
        yield


def check_same(folder: Path, identity: Mapping[str, object], partly: bool = False) -> dict[str, str]:
    """The metadata of the state in a folder, none if there is no state; InputError where it is of another run.

    `partly`: the identity is not all there is to one, and is compared as far as it goes.
    """
    path = folder / STATE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        found, _ = dict(json.loads(metadata["identity"])), int(metadata["step"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        remedy = "delete it to start over, or use another folder"
        raise InputError(f"{path} is no state of a run, or a damaged one ({error}): {remedy}") from error
    known = json.loads(json.dumps(identity))
    for key in known if partly else known | found:
        held: Any = found.get(key)
        wanted = known.get(key)
        if held != wanted:
            for name in wanted if isinstance(held, dict) and isinstance(wanted, dict) else ():
                if held.get(name) != wanted[name]:  # the first of its entries that differs
                    key, held, wanted = f"{key}: {name}", held.get(name), wanted[name]
                    break
            remedy = "go on with the same, or use another folder"
            raise InputError(f"{folder} holds a run with another {key} ({held}), expected {wanted}: {remedy}")
    return metadata


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """A list that holds each SIGINT and SIGTERM that came meanwhile; only the main thread can be told."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {kind: signal.signal(kind, lambda kind, _: told.append(kind)) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
