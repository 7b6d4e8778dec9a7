"""Samplers: pure functions of `(denoise, x, sigmas)`, one per algorithm, in sigma space.

`denoise(x, sigma)` returns the estimate of the clean x0; x = x0 + sigma * noise. Each sampler is an iterator of
`Step`s. The symbols are those of Karras et al. 2022 (arXiv:2206.00364).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sdxl_ref.noise import Generator, draw_noise

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """The state after a step: `x` at level `sigma`, and the clean estimate `denoised` that the step used.

    The sampler goes on from `x` itself, so that writing into it steers the run.
    """

    x: Tensor
    denoised: Tensor
    sigma: Tensor


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - denoised) / sigma: Karras et al. 2022, algorithm 1 without its correction.

    The same steps as DDIM with eta 0 (Song et al. 2020, arXiv:2010.02502). Draws no noise.
    """
    for sigma, sigma_next in pairwise(_levels(sigmas, x)):
        denoised = denoise(x, sigma)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
        yield Step(x, denoised, sigma_next)


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), algorithm 2, with the posterior ("fixed small") variance.

    In sigma space the posterior of x at the next level is an Euler step to sigma_next^2 / sigma, then fresh noise
    that brings the level back up to sigma_next. Draws randn(x.shape) at each step but the one that ends at 0.
    """
    generator = _needs("ddpm", generator)
    for sigma, sigma_next in pairwise(_levels(sigmas, x)):
        denoised = denoise(x, sigma)
        down = sigma_next**2 / sigma
        x = x + (x - denoised) / sigma * (down - sigma)
        if sigma_next > 0:
            up = sigma_next * torch.sqrt(1 - (sigma_next / sigma) ** 2)
            x = x + up * draw_noise(x.shape, generator).to(x)
        yield Step(x, denoised, sigma_next)


def _levels(sigmas: Tensor, x: Tensor) -> Tensor:
    """The levels as float32 on x's device; iterating gives 0-d tensors."""
    return sigmas.to(device=x.device, dtype=torch.float32)


def _needs(name: str, generator: Generator | None) -> Generator:
    if generator is None:
        raise ValueError(f"{name} draws noise at each step: hand in a torch.Generator, or one per image in a list")
    return generator


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {"euler": euler, "ddpm": ddpm}
