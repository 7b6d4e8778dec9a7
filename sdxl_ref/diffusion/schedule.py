"""Noise levels: the training schedule, the grids that samplers step along, and the rules that cut them.

Everything is in sigma space: x = x0 + sigma * noise, with sigma = sqrt((1 - abar) / abar) for the training step t
(Karras et al. 2022, arXiv:2206.00364). SDXL's betas are linear in the square root, 0.00085 to 0.012 over 1000 steps
(`LegacyDDPMDiscretization` in sgm/modules/diffusionmodules/discretizer.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_ref.config import InputError, unknown

TRAIN_STEPS = 1000
SPACINGS = ("leading", "trailing", "linspace", "sgm")
STRENGTH_RULES = ("exact", "sgm")
UNIT_VARIANCE = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc")  # samplers whose own x has variance 1


@dataclass(frozen=True, eq=False)
class Grid:
    """Descending levels `sigmas` (n+1,), the last one 0 or where the run stops, and the training step of each of the
    first n. A level on the grid keeps its exact pair; any other goes through `inverse`. Equal to itself alone."""

    sigmas: Tensor
    timesteps: tuple[float, ...]
    inverse: Callable[[float], float]

    def timestep(self, sigma: float) -> float:
        """The training step of a level."""
        for level, t in zip(self.sigmas.tolist(), self.timesteps, strict=False):  # the last level is no step's
            if level == sigma:
                return t
        return self.inverse(sigma)

    def cut(self, start: int, stop: int) -> "Grid":
        """The steps from number `start` up to, not including, number `stop`."""
        return Grid(self.sigmas[start : stop + 1], self.timesteps[start:stop], self.inverse)

    def steps_above(self, sigma: float) -> int:
        """How many steps start at `sigma` or above."""
        return int((self.sigmas[:-1] >= sigma).sum())


class NoiseSchedule:
    """The noise level of every training step; `.sigmas` (1000,) float32, ascending, computed in float64."""

    def __init__(self) -> None:
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), TRAIN_STEPS) ** 2
        alphas_cumprod = np.cumprod(1.0 - betas)
        self.table: NDArray[np.float64] = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
        self.sigmas = torch.from_numpy(self.table).float()

    def timesteps(self, steps: int, spacing: str = "leading") -> NDArray[Any]:
        """The training steps (steps,) that a grid visits, descending; fractional for "linspace".

        "leading" (with SDXL's `steps_offset` 1), "trailing" and "linspace" are diffusers' (Lin et al. 2023,
        arXiv:2305.08891, table 2), "sgm" is the official code's. InputError for an unknown spacing, steps outside
        1..1000, or a grid that leaves the training steps.
        """
        if not (isinstance(steps, int) and 1 <= steps <= TRAIN_STEPS):
            raise InputError(f"the number of steps must be a whole number from 1 to {TRAIN_STEPS}, found {steps!r}")
        t: NDArray[Any]
        if spacing == "leading":
            t = np.arange(steps)[::-1] * (TRAIN_STEPS // steps) + 1.0
        elif spacing == "trailing":
            t = np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)[:steps].round() - 1.0  # as diffusers rounds halves
        elif spacing == "linspace":
            t = np.linspace(0.0, TRAIN_STEPS - 1.0, steps)[::-1]
        elif spacing == "sgm":
            t = np.linspace(TRAIN_STEPS - 1, 0, steps, endpoint=False).astype(int).astype(float)
            t = t if steps < TRAIN_STEPS else np.arange(TRAIN_STEPS - 1.0, -1.0, -1.0)
        else:
            from sdxl_ref.diffusion.spacing_names import answer  # other tools' names

            raise InputError(answer(spacing, SPACINGS))
        if t[0] > TRAIN_STEPS - 1:
            raise InputError(f'"leading" with {steps} steps leaves the {TRAIN_STEPS} training steps: use "trailing"')
        return t

    def grid(self, steps: int, spacing: Any = "leading", karras: bool = False) -> Grid:
        """The levels that a run steps along, each with its training step. See `timesteps` and `discretize`.

        `spacing` may also be an object that makes them: `scheduler_levels.SchedulerLevels`.
        """
        if hasattr(spacing, "grid"):
            return spacing.grid(steps)
        t = self.timesteps(steps, spacing)
        sigmas = np.interp(t, np.arange(TRAIN_STEPS), self.table)
        if karras:
            high = sigmas[0] ** (1 / 7)
            low = sigmas[-1] ** (1 / 7)
            sigmas = (high + np.linspace(0.0, 1.0, steps) * (low - high)) ** 7
        inverse = self.nearest_timestep if spacing == "sgm" else self.timestep
        levels = torch.from_numpy(np.append(sigmas, 0.0)).float()
        exact = [inverse(s) for s in levels[:-1].tolist()] if karras else t.tolist()
        return Grid(levels, tuple(exact), inverse)

    def discretize(self, steps: int, spacing: str = "leading", karras: bool = False) -> Tensor:
        """Noise levels (steps+1,) float32, descending, the last one 0.

        karras: rho = 7 between the first and the last level of the spacing (Karras et al. 2022, equation 5).
        """
        return self.grid(steps, spacing, karras).sigmas

    def timestep(self, sigma: float) -> float:
        """The training step of a noise level, continuous: linear in log sigma between the steps, ends clamped.

        The rule of diffusers for Karras sigmas (`_sigma_to_t`).
        """
        return float(np.interp(math.log(sigma), np.log(self.table), np.arange(TRAIN_STEPS)))

    def nearest_timestep(self, sigma: float) -> float:
        """The training step of the nearest level, as the official code quantises (`DiscreteDenoiser`)."""
        return float(np.abs(self.table - sigma).argmin())

    def switch_sigma(self, share: float) -> float:
        """The lowest level of the first `share` of the training steps: 0.8 is the level of t = 200."""
        if not 0 <= share <= 1:
            raise InputError(f"a share of the training steps must be from 0 to 1, found {share}")
        t = round(TRAIN_STEPS * (1 - Fraction(str(share))))
        return float(self.sigmas[t]) if t < TRAIN_STEPS else math.inf

    def initial_scale(self, sigmas: Tensor, spacing: Any, sampler: str = "euler") -> float:
        """What unit noise is multiplied by at the start of text-to-image, for levels (n+1,).

        sqrt(1 + sigma^2) at the first level. But sigma itself for "trailing" and "linspace", also as a folder asks for
        them, as diffusers' Euler, ancestral Euler, Heun and LMS have it (`init_noise_sigma`); not for the samplers
        whose schedulers there start from unit noise in their own scaling.
        """
        first = float(sigmas[0])
        if getattr(spacing, "spacing", spacing) in ("trailing", "linspace") and sampler not in UNIT_VARIANCE:
            return first
        return math.sqrt(1.0 + first**2)


def strength_steps(steps: int, strength: float, rule: str = "exact") -> int:
    """How many of `steps` an image-to-image run does: floor(steps * strength), exactly (50 * 0.58 is 29).

    The rule of diffusers, without its rounding error. "sgm" is the official code's (`Img2ImgDiscretizationWrapper`),
    which counts the trailing zero as a level: 10 steps at 0.4 run 3, not 4. InputError outside (0, 1], for another
    rule, or where no step is left.
    """
    if rule not in STRENGTH_RULES:
        raise InputError(unknown("strength rule", rule, STRENGTH_RULES))
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, found {strength}")
    trailing_zeros = 1 if rule == "sgm" else 0
    run = math.floor((steps + trailing_zeros) * Fraction(str(strength))) - trailing_zeros
    if run < 1:
        smallest = Fraction(1 + trailing_zeros, steps + trailing_zeros)
        rounded_up = math.ceil(smallest * 10_000) / 10_000
        raise InputError(f"strength {strength} runs 0 steps: the smallest strength is {rounded_up}")
    return run
