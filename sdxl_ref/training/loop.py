"""The training loop: AdamW with warm-up and cosine, clipping, EMA, autocast; a log; stopping and resuming.

It does not know what is trained: it takes a module and a function `step_loss(step, generator)`. Whatever is drawn at
a step comes from that step's own generator, so that a run that was stopped and resumed is, on the CPU, equal bit for
bit to one that was not. Under torch.distributed every process makes the same steps; the first one writes.
"""

import csv
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.training.processes import this_process
from sdxl_ref.training.state import LOG, STATE, check_same, truncate_log
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.tensor_files import open_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by its own names
SEED_STRIDE = 1_000_003  # between the generators of two seeds
LIMIT = 1e9
LEAST = {"steps": 1, "accumulate": 1, "warm_up": 0, "learning_rate": 0, "weight_decay": 0}
StepLoss = Callable[[int, torch.Generator], Tensor]
Signals = list[int]


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes. Two runs with equal settings and data are equal."""

    steps: int
    learning_rate: float
    warm_up: int = 200  # steps over which the rate rises from 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of all gradients together
    ema: float = 0.999  # decay of the averaged weights; 0: there are none
    autocast: str = ""  # "bfloat16": matrix products in it; "": everything in the weights' dtype
    seed: int = 0
    accumulate: int = 1  # batches whose gradients are averaged for one step

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not least <= value <= LIMIT:
                raise InputError(f"{name.replace('_', ' ')} must be a number from {least} to 1e9, found {value}")
        if not 0 <= self.ema < 1:
            raise InputError(f"the decay of the averaged weights must be at least 0 and below 1, found {self.ema}")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to 0 (Loshchilov & Hutter, arXiv:1608.03983)."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def generator(self, step: int) -> torch.Generator:
        """The generator of all that is drawn at a step."""
        return torch.Generator().manual_seed((self.seed * SEED_STRIDE + step) % 2**64)


class Metrics(NamedTuple):
    """What the log says of a step."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Run:
    """A module in training, in a folder of its own: `state.safetensors` to resume from, `log.csv` to look at.

    `identity` names what is trained on what; with the settings it has to be that of the run in the folder, otherwise
    InputError. The averaged weights are in `averaged`, by parameter name. With several processes `replicas` averages
    their gradients: `step_loss` calls it.
    """

    state_name = STATE
    caches_casts = True  # autocast keeps a weight's cast for a further use in the same forward pass

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        folder: Path,
        identity: Mapping[str, object],
        replicas: DistributedDataParallel | None = None,
    ) -> None:
        self.module = module
        self.settings = settings
        self.folder = folder
        self.replicas = replicas
        self.leads = this_process().leads
        self.identity = json.loads(json.dumps({"settings": asdict(settings), **identity}))
        self.weights = self._learned_weights()
        if not self.weights:
            raise InputError("nothing to train: no parameter of the module requires a gradient")
        self.averaged: dict[str, Tensor] = {}
        if settings.ema:
            self.averaged = {name: at_least_float32(p.detach().clone()) for name, p in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.step = 0
        self.is_consistent = True  # False while a step changes the weights
        self.is_stopping = False  # True once a process was told to stop and all have heard of it
        self._open_folder()

    def train(self, step_loss: StepLoss, save_every: int = 1000, stop: int | None = None) -> Iterator[int]:
        """Train to the end, or to step `stop`; yields the number of steps done after each one.

        The state is saved every `save_every` steps, at the end, and when the run is stopped: SIGINT and SIGTERM let
        the step end, then KeyboardInterrupt is raised.
        """
        last = self.settings.steps if stop is None else min(stop, self.settings.steps)
        start = time.perf_counter()
        is_hidden = None if self.leads else True  # None: hidden where standard error is no terminal
        bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=is_hidden)
        with bar, (self.folder / LOG).open("a", newline="") as log, stop_signals() as signals:
            writer = csv.writer(log)
            try:
                while self.step < last:
                    metrics = self._advance(step_loss, signals)
                    bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
                    bar.update()
                    if self.leads:
                        writer.writerow(self._log_row(metrics, time.perf_counter() - start))
                        log.flush()
                    if self._stops(signals):
                        raise KeyboardInterrupt
                    if self.step % save_every == 0 and self.step < last:
                        self.save()
                    yield self.step
            except BaseException as error:
                if self.is_consistent and self._can_save_after(error):
                    self.save()
                raise
            self.save()

    def save(self) -> None:
        """Write weights, averaged weights and the optimizer's moments in the place of an older state."""
        if self.leads:
            write_tensors(self.folder / STATE, self._tensors(), self._facts())

    def averages(self) -> Mapping[str, Tensor]:
        """The averaged weights, of the shapes of the module's own."""
        return self.averaged

    def _learned_weights(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _tensors(self) -> dict[str, Tensor]:
        """What the state holds, by name."""
        state: dict[str, Tensor] = {}
        for name, p in self.weights.items():
            state[f"weights.{name}"] = p.detach().contiguous()
            moments = self.optimizer.state.get(p, {})
            for moment in MOMENTS:
                if moment in moments:
                    state[f"{moment}.{name}"] = moments[moment].contiguous()
        for name, average in self.averaged.items():
            state[f"averaged.{name}"] = average.contiguous()
        return state

    def _facts(self) -> dict[str, str]:
        """What the state says of itself."""
        return {"step": str(self.step), "identity": json.dumps(self.identity)}

    def _can_save_after(self, error: BaseException) -> bool:
        """Whether the state is saved when an error ends the run."""
        return True

    def _open_folder(self) -> None:
        """Resume from the state in the folder, or make the folder this run's own, as long as there is room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        has_state = (self.folder / self.state_name).exists()
        if has_state:
            self._resume()
        if self.leads:
            truncate_log(self.folder, self.step)
            clear(self.folder)
        if not has_state:
            self.save()

    def _resume(self) -> None:
        """Read step, weights, averaged weights and moments. InputError where the state is of another run or model."""
        path = self.folder / STATE
        metadata = check_same(self.folder, self.identity)
        with open_tensors(path) as file, torch.no_grad():
            keys = set(file.keys())
            saved_names = {key.removeprefix("weights.") for key in keys if key.startswith("weights.")}
            if saved_names != self.weights.keys():
                differing = ", ".join(sorted(saved_names ^ self.weights.keys())[:3])
                raise InputError(f"{path} is of another model (differs in {differing}): use another folder")
            self.step = int(metadata["step"])
            for name, p in self.weights.items():
                p.copy_(file.get_tensor(f"weights.{name}"))
                if name in self.averaged:
                    self.averaged[name].copy_(file.get_tensor(f"averaged.{name}"))
                if f"{MOMENTS[0]}.{name}" in keys:  # absent where no gradient came
                    moments = {moment: file.get_tensor(f"{moment}.{name}").to(p.device) for moment in MOMENTS}
                    self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def _advance(self, step_loss: StepLoss, signals: Signals) -> Metrics:
        """One step of the optimizer. InputError where the loss or the gradient is not finite: then nothing changes."""
        loss = self._agree(self._backward(step_loss), signals)
        norm = self._clip()
        self._check_finite("loss", loss)
        self._check_finite("gradients' norm", norm)
        rate = self.settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.is_consistent = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        self.is_consistent = True
        return Metrics(loss, norm, rate)

    def _clip(self) -> float:
        """The norm of all gradients together, before they are made shorter where it is too large."""
        return float(nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip))

    def _backward(self, step_loss: StepLoss) -> Tensor:
        """The gradients of the step's batches, and their mean loss (0-d)."""
        count = self.settings.accumulate
        generator = self.settings.generator(self.step)
        device = next(iter(self.weights.values())).device
        total = torch.zeros((), device=device)
        for i in range(count):
            with self._gradients_apart(is_last=i == count - 1):
                with self._autocast(device):
                    loss = step_loss(self.step, generator) / count
                loss.backward()
            total += loss.detach()
        return total

    def _gradients_apart(self, is_last: bool) -> AbstractContextManager[None]:
        """The processes average their gradients with the last batch of a step, not before."""
        if self.replicas is None or is_last:
            return nullcontext()
        return self.replicas.no_sync()

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = getattr(torch, self.settings.autocast or "bfloat16")
        return torch.autocast(device.type, dtype, enabled=bool(self.settings.autocast), cache_enabled=self.caches_casts)

    def _agree(self, loss: Tensor, signals: Signals) -> float:
        """The mean loss of all processes; and if one of them is to stop, all are."""
        if not distributed.is_initialized():
            return float(loss)
        sums = torch.stack([loss / distributed.get_world_size(), torch.full_like(loss, len(signals))])  # (2,)
        distributed.all_reduce(sums)
        self.is_stopping = bool(sums[1])
        return float(sums[0])

    def _stops(self, signals: Signals) -> bool:
        """Whether this was the last step: of several processes only as all know it, or one would leave the others."""
        return self.is_stopping if distributed.is_initialized() else bool(signals)

    def _check_finite(self, quantity: str, value: float) -> None:
        if math.isfinite(value):
            return
        remedy = f"use a lower learning rate (it is {self.settings.learning_rate}), in another folder"
        if self.step == 0:
            remedy = "no step was made yet, so the weights or the data are to blame: look at both"
        raise InputError(f"the {quantity} is {value} at step {self.step}: {remedy}")

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights towards the new ones, at first faster than `ema` says: early weights fade soon."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for name, average in self.averaged.items():
            average.lerp_(self.weights[name].to(average.dtype), 1 - decay)

    def _log_row(self, metrics: Metrics, seconds: float) -> list[Any]:
        """A row of the log, in the order of COLUMNS."""
        loss = f"{metrics.loss:.6g}"
        norm = f"{metrics.gradient_norm:.4g}"
        return [self.step, loss, norm, f"{metrics.learning_rate:.4g}", f"{seconds:.2f}"]


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """A list of the SIGINTs and SIGTERMs that come meanwhile; they reach the main thread alone."""
    signals: Signals = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def receive(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
