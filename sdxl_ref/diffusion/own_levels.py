"""Levels that are handed in: `sigmas` or `timesteps` of a request. Loaded where there are some.

As diffusers' Euler has them (`set_timesteps`): of `sigmas` the last one is where the run ends, usually 0; `timesteps`
may be fractional, lie straight between the training steps' levels, and end at 0. Such lists are published, for example
by Sabour et al. 2024 ("Align Your Steps", arXiv:2404.14507).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_ref.config import Defaults, InputError
from sdxl_ref.diffusion.schedule import TRAIN_STEPS, Grid, NoiseSchedule

LARGEST = 1e6  # of a sigma
SEPARATORS = re.compile(r"[\s,;\[\]()]+")


@dataclass(frozen=True)
class OwnLevels:
    """In place of a spacing. `timesteps` where these were handed in, else () and `sigmas`."""

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    karras = False  # as of every spacing that is an object

    def __str__(self) -> str:
        name, values = ("timesteps", self.timesteps) if self.timesteps else ("sigmas", self.sigmas)
        return f"own {name} " + ", ".join(f"{value:.4g}" for value in values)

    @property
    def steps(self) -> int:
        return len(self.timesteps) or len(self.sigmas) - 1

    def grid(self, steps: int) -> Grid:
        schedule = NoiseSchedule()
        if self.timesteps:
            sigmas = [*np.interp(self.timesteps, np.arange(TRAIN_STEPS), schedule.table), 0.0]
            return Grid(torch.tensor(sigmas, dtype=torch.float32), self.timesteps, schedule.timestep)
        levels = torch.tensor(self.sigmas, dtype=torch.float32)
        return Grid(levels, tuple(map(schedule.timestep, levels[:-1].tolist())), schedule.timestep)


def completed(request: Any, defaults: Defaults) -> Any:
    """A request whose spacing is its own levels, and whose steps are theirs.

    InputError for both kinds at once, for a spacing besides, and for levels that do not fall.
    """
    if request.sigmas is not None and request.timesteps is not None:
        raise InputError("sigmas and timesteps both say where the run steps: give one of them")
    name = "timesteps" if request.sigmas is None else "sigmas"
    for other in ("spacing", "karras"):
        if getattr(request, other):
            raise InputError(f"{other} is of no use with {name}: leave it out")
    levels = OwnLevels(**{name: checked(name, getattr(request, name))})
    if request.num_inference_steps not in (type(request).num_inference_steps, levels.steps):
        raise InputError(f"{name} make {levels.steps} steps, found num_inference_steps {request.num_inference_steps}")
    spaced = replace(request, sigmas=None, timesteps=None, spacing=levels, num_inference_steps=levels.steps)
    return spaced.completed(defaults)


def checked(name: str, values: Any) -> tuple[float, ...]:
    """InputError unless these are descending numbers: sigmas down to 0 or above, or training steps."""
    numbers = values.tolist() if hasattr(values, "tolist") else values
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if not is_list or not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        raise InputError(f"{name} must be a list of numbers, found {values!r:.60}")
    if any(low >= high for high, low in pairwise(numbers)):
        raise InputError(f"{name} must fall from each to the next, found {values!r:.60}")
    if name == "timesteps" and not (numbers and numbers[-1] >= 0 and numbers[0] <= TRAIN_STEPS - 1):
        raise InputError(f"timesteps must be from {TRAIN_STEPS - 1} to 0, found {values!r:.60}")
    if name == "sigmas" and not (len(numbers) > 1 and numbers[-1] >= 0 and numbers[0] <= LARGEST):
        raise InputError(f"sigmas must be at least two, from a million to 0, found {values!r:.60}")
    return tuple(map(float, numbers))


def told(request: Any, defaults: Defaults) -> str:
    """What a plan says of them."""
    levels = request.completed(defaults).spacing
    last = levels.sigmas[-1] if levels.sigmas else 0.0
    end = f"; the run ends at sigma {last:.4g}: its noise stays in" if last > 0 else ""
    return f"; {levels}{end}"


def read(text: str) -> list[float]:
    """Numbers of an option: a list, or a file with one. InputError for anything else."""
    where = Path(text)
    try:
        written = where.read_text(encoding="utf-8") if where.is_file() else text
        return [float(number) for number in SEPARATORS.split(written) if number]
    except (OSError, ValueError) as error:
        raise InputError(f"expected numbers with commas between, or a file of them, found {text!r:.60}") from error
