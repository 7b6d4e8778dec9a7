"""Guidance that is not the same everywhere: in an interval of sigma, by step, by picture. Loaded where it is asked for.

Source: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models" (arXiv:2404.07724).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser
from sdxl_ref.diffusion.guidance import Guidance
from sdxl_ref.diffusion.schedule import Grid


@dataclass(frozen=True)
class ScheduledGuidance:
    """`denoise(x, sigma)` with the guidance of the level. Outside `interval` the positive side runs alone.

    `scales` has one for each step of the grid: an evaluation belongs to the last step that begins at its level or
    above. A scale may be a tensor (b,1,1,1), for each picture its own.
    """

    guidance: Guidance
    scales: Sequence[Any]
    grid: Grid
    interval: tuple[float, float]  # sigma, both ends included

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        low, high = self.interval
        if not low <= float(sigma) <= high:
            return positive_side(self.guidance.denoise)(x, sigma)
        step = max(0, self.grid.steps_above(float(sigma)) - 1)
        scale = self.scales[step]
        scale = scale.to(x) if isinstance(scale, Tensor) else scale
        return replace(self.guidance, scale=scale)(x, sigma)


def positive_side(denoise: Denoiser) -> Denoiser:
    context, y = (both.chunk(2)[1] for both in (denoise.conditioning.context, denoise.conditioning.y))
    return replace(denoise, conditioning=Conditioning(context, y))


def scheduled(request: Any, denoise: Denoiser, grid: Grid) -> ScheduledGuidance:
    """The guidance that a request asks for. InputError for a list of another length than the run or its pictures."""
    steps = len(grid.timesteps)
    scale = request.guidance_scale
    count = len(denoise.conditioning.context) // 2
    if isinstance(scale, Tensor):
        if scale.numel() not in (1, count):
            raise InputError(f"expected a guidance_scale for each of {count} pictures, found {scale.numel()}")
        scales: list[Any] = [scale.float().reshape(-1, 1, 1, 1)] * steps
    elif isinstance(scale, Sequence):
        if len(scale) != steps:
            raise InputError(f"expected a guidance_scale for each of {steps} steps that run, found {len(scale)}")
        scales = list(scale)
    else:
        scales = [scale] * steps
    guidance = Guidance(denoise, 1.0, request.guidance_rescale)
    return ScheduledGuidance(guidance, scales, grid, request.guidance_interval or (0.0, math.inf))


def is_guided(scale: Any) -> bool:
    """Whether any step or picture has guidance."""
    return bool((torch.as_tensor(scale) > 1).any())


def check(scale: Any, interval: Any) -> None:
    """InputError unless these are finite numbers, and an interval of sigma."""
    numbers = scale.flatten().tolist() if isinstance(scale, Tensor) else scale
    numbers = numbers if isinstance(numbers, Sequence) else [numbers]
    if isinstance(numbers, str) or not numbers or not all(is_number(number) for number in numbers):
        others = "" if isinstance(scale, Real) else ", one for each step in a list, or one for each picture in a tensor"
        raise InputError(f"guidance_scale must be a finite number{others}, found {scale!r:.60}")
    if interval is None:
        return
    is_pair = isinstance(interval, Sequence) and not isinstance(interval, str) and len(interval) == 2
    if not is_pair or not all(isinstance(end, Real) for end in interval) or not 0 <= interval[0] <= interval[1]:
        raise InputError(f"guidance_interval must be two levels, sigma from low to high, found {interval!r:.60}")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
