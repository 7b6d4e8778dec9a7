"""What all samplers share: the form of a sampler, the step it yields, and the noise that a step draws.

Everything is in sigma space: x = x0 + sigma * noise, and `denoise(x, sigma)` returns the estimate of x0. The symbols
are those of the papers: sigma and gamma of Karras et al. 2022 (arXiv:2206.00364), eta of Song et al. 2020
(arXiv:2010.02502).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.noise import Generator, draw_noise

Denoise = Callable[[Tensor, Tensor], Tensor]
MOST = 1e6  # of an option's amount
LARGEST_GAMMA = math.sqrt(2) - 1  # a churn at most doubles the variance of the noise: Karras et al. 2022, algorithm 2


@dataclass(frozen=True)
class Step:
    """The state after a step: `x` at level `sigma`, and the clean estimate `denoised` that the step used.

    The sampler goes on from `x` itself, so that writing into it steers the run.
    """

    x: Tensor
    denoised: Tensor
    sigma: Tensor


class Sampler(Protocol):
    """A function from a noisy x (b, ...) at level `sigmas[0]` to one `Step` for each interval of `sigmas` (n+1,)."""

    __name__: str
    __doc__: str | None
    stochastic: bool  # whether it draws noise with its default options
    evaluations: int  # of `denoise` in a full step; a step that ends at 0 may need fewer
    paper: str  # where the method comes from

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None, **options: Any
    ) -> Iterator[Step]: ...


def sampler(*, stochastic: bool, evaluations: int, paper: str) -> Callable[[Callable[..., Iterator[Step]]], Sampler]:
    """A decorator that puts a sampler's facts on the function and returns the function itself. See `Sampler`."""

    def describe(function: Callable[..., Iterator[Step]]) -> Sampler:
        described = cast(Sampler, function)
        described.stochastic = stochastic
        described.evaluations = evaluations
        described.paper = paper
        return described

    return describe


def check_amounts(**amounts: float) -> None:
    """InputError unless all of these options are from 0 to a million: their squares are finite in float32."""
    for name, value in amounts.items():
        if not 0 <= value <= MOST:
            raise InputError(f"{name} must be a number from 0 to a million, found {value}")


def levels(sigmas: Tensor, x: Tensor) -> Tensor:
    """The levels as float32 on x's device; iterating gives 0-d tensors."""
    return sigmas.to(device=x.device, dtype=torch.float32)


def add_noise(x: Tensor, spread: Tensor | float, generator: Generator | None) -> Tensor:
    """x with noise of that spread, drawn only where it is above 0. Without a generator that is a ValueError."""
    if not spread > 0:
        return x
    if generator is None:
        raise ValueError("this sampler draws noise at each step: hand in a torch.Generator, or one per image in a list")
    return x + spread * draw_noise(x.shape, generator).to(x)


def churn(x: Tensor, sigma: Tensor, gamma: float, s_noise: float, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Fresh noise that raises x from sigma to sigma_hat = sigma * (1 + gamma) before a step; (x, sigma_hat).

    Karras et al. 2022, algorithm 2, lines 5 and 6. Draws nothing where gamma is 0.
    """
    if gamma == 0:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    spread = s_noise * sigma * math.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
    return add_noise(x, spread, generator), sigma_hat


def churn_gammas(sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float) -> list[float]:
    """For each interval of `sigmas` (n+1,), by which share its level is raised first.

    gamma = min(s_churn / n, sqrt(2) - 1) for the levels from s_tmin to s_tmax, 0 for the others.
    """
    n = len(sigmas) - 1
    if s_churn == 0:
        return [0.0] * n
    gamma = min(s_churn / n, LARGEST_GAMMA)
    return [gamma if s_tmin <= sigma <= s_tmax else 0.0 for sigma in sigmas[:-1].tolist()]
