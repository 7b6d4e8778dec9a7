"""Samplers: pure functions of `(denoise, x, sigmas)`, one per algorithm, in sigma space.

`denoise(x, sigma)` returns the estimate of the clean x0; x = x0 + sigma * noise. Each sampler is an iterator of
`Step`s. The symbols are those of Karras et al. 2022 (arXiv:2206.00364). The first-order methods stand here; those of
higher order in `higher_order.py`, which is imported when one of them runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Denoise
from sdxl_ref.noise import Generator, draw_noise


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
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
        yield Step(x, denoised, sigma_next)


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None
) -> Iterator[Step]:
    """An Euler step below the next level, then fresh noise that brings x back up to it (k-diffusion, eta 1).

    The same steps as DDPM: Ho et al. 2020 (arXiv:2006.11239), algorithm 2, with the posterior ("fixed small")
    variance. Draws randn(x.shape) at each step but the one that ends at 0.
    """
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next)
        x = x + (x - denoised) / sigma * (down - sigma)
        x = add_noise(x, up, generator)
        yield Step(x, denoised, sigma_next)


def levels(sigmas: Tensor, x: Tensor) -> Tensor:
    """The levels as float32 on x's device; iterating gives 0-d tensors."""
    return sigmas.to(device=x.device, dtype=torch.float32)


def ancestral(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Where a step goes down to, and the spread of the noise that leads back: down^2 + up^2 = sigma_next^2."""
    return sigma_next**2 / sigma, sigma_next * torch.sqrt(1 - (sigma_next / sigma) ** 2)


def add_noise(x: Tensor, up: Tensor, generator: Generator | None) -> Tensor:
    """x with noise of spread `up`, drawn only where that is above 0. ValueError without a generator."""
    if generator is None:
        raise ValueError("this sampler draws noise at each step: hand in a torch.Generator, or one per image in a list")
    return x + up * draw_noise(x.shape, generator).to(x) if up > 0 else x


def _higher_order(name: str) -> Callable[..., Iterator[Step]]:
    return lambda *args, **options: getattr(import_module("sdxl_ref.diffusion.higher_order"), name)(*args, **options)


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "euler": euler,
    "ddim": euler,
    "euler_ancestral": euler_ancestral,
    "ddpm": euler_ancestral,
    **{name: _higher_order(name) for name in ("heun", "dpmpp_2m", "dpmpp_2s_ancestral", "lms")},
}
