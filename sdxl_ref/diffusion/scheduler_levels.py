"""The levels of diffusers' schedulers, as the settings in a folder ask for them. Loaded where a folder does.

The classes fall into three families that make other levels of the same settings. "euler" (Euler, ancestral Euler, Heun,
LMS): fractional training steps; other sigmas lie between the ends of the spacing. "multistep" (DPM-Solver++, UniPC):
whole training steps, one more than are run, the last left out; other sigmas lie between the ends of the training
schedule. "ddim" (DDIM, DDPM): whole training steps. Source: `set_timesteps` of these classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import TRAIN_STEPS, Grid, NoiseSchedule

Array = NDArray[Any]
ALMOST_LAST = TRAIN_STEPS - 1.5  # diffusers' float32 tables put the highest level just below the last step, 998.99…
RHO = 7.0  # Karras et al. 2022, equation 5
BETA = 0.6  # both parameters of the beta distribution (Lee et al. 2024, arXiv:2407.12173)


@dataclass(frozen=True)
class SchedulerLevels:
    """What a scheduler's settings say of its levels. `sigmas`: a key of `SIGMAS`, or "" for those of the spacing."""

    scheduler: str  # the class, for messages
    family: str  # "euler", "multistep" or "ddim"
    spacing: str  # "leading", "trailing" or "linspace"
    steps_offset: int = 0  # of "leading"
    sigmas: str = ""
    ends_at_zero: bool = True  # or at the lowest level of the training schedule

    def __str__(self) -> str:
        offset = f" with steps_offset {self.steps_offset}" if self.spacing == "leading" else ""
        sigmas = f", {self.sigmas} sigmas" if self.sigmas else ""
        end = "" if self.ends_at_zero else ", down to the lowest training level"
        return f"{self.spacing}{offset}{sigmas}{end} ({self.scheduler})"

    @property
    def karras(self) -> bool:
        return self.sigmas == "karras"

    def changed(self, spacing: str | None, karras: bool | None) -> "str | SchedulerLevels":
        """The same with another spacing of diffusers', or with or without Karras' sigmas."""
        if spacing == "sgm":
            if (self.sigmas and karras is None) or not self.ends_at_zero:
                raise InputError(f'the spacing "sgm" cannot have the other settings of the folder: {self}')
            return spacing
        sigmas = self.sigmas
        if karras is not None:
            sigmas = "karras" if karras else sigmas.replace("karras", "")
        return replace(self, spacing=spacing or self.spacing, sigmas=sigmas)

    def grid(self, steps: int) -> Grid:
        """The levels of a run. InputError for a number of steps or a spacing that leaves the training steps."""
        if not (isinstance(steps, int) and 1 <= steps <= TRAIN_STEPS):
            raise InputError(f"the number of steps must be a whole number from 1 to {TRAIN_STEPS}, found {steps!r}")
        if self.scheduler == "DDIMScheduler" and self.spacing == "trailing" and TRAIN_STEPS % steps:
            raise InputError(
                f"{self} with {steps} steps goes to levels that it does not visit: use a number that divides 1000, "
                "or another spacing"
            )
        schedule = NoiseSchedule()
        t = self.timesteps(steps)
        if not 0 <= t[-1] <= t[0] < TRAIN_STEPS:
            advice = "use fewer steps, or the spacing trailing or linspace"
            raise InputError(f"{self} with {steps} steps leaves the {TRAIN_STEPS} training steps: {advice}")
        sigmas = np.interp(t, np.arange(TRAIN_STEPS), schedule.table)
        if self.sigmas:
            ends = (schedule.table[-1], schedule.table[0]) if self.family == "multistep" else (sigmas[0], sigmas[-1])
            sigmas = SIGMAS[self.sigmas](*ends, steps)
            t = np.array([schedule.timestep(sigma) for sigma in sigmas])
            if self.family == "multistep":
                t = t.round() if self.karras else np.trunc(t.clip(max=ALMOST_LAST))
        last = 0.0 if self.ends_at_zero else schedule.table[0]
        levels = torch.from_numpy(np.append(sigmas, last)).float()
        return Grid(levels, tuple(t.tolist()), schedule.timestep)

    def timesteps(self, steps: int) -> Array:
        """The training steps of the spacing (steps,), descending."""
        points = steps + 1 if self.family == "multistep" else steps
        if self.spacing == "trailing":
            return np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)[:steps].round() - 1.0
        if self.spacing == "leading":
            t = np.arange(points)[::-1] * (TRAIN_STEPS // points) + float(self.steps_offset)
        else:
            t = np.linspace(0.0, TRAIN_STEPS - 1.0, points)[::-1]
        return (t if self.family == "euler" else t.round())[:steps]


def karras(high: float, low: float, steps: int) -> Array:
    """Evenly spaced in sigma^(1/7)."""
    start = high ** (1 / RHO)
    return (start + np.linspace(0.0, 1.0, steps) * (low ** (1 / RHO) - start)) ** RHO


def exponential(high: float, low: float, steps: int) -> Array:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(high: float, low: float, steps: int) -> Array:
    """At the quantiles of a beta distribution: more of them near both ends. InputError without scipy."""
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise InputError("the folder's beta sigmas need scipy: pip install scipy, or name another spacing") from error
    quantiles = distribution.ppf(1.0 - np.linspace(0.0, 1.0, steps), BETA, BETA)
    return low + quantiles * (high - low)


SIGMAS: dict[str, Callable[[float, float, int], Array]] = {"karras": karras, "exponential": exponential, "beta": beta}
