"""Euler's method with fresh noise at each step."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from sdxl_ref.diffusion.higher_order import ancestral
from sdxl_ref.diffusion.steps import Denoise, Step, add_noise, check_amounts, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=True, evaluations=1, paper="arXiv:2010.02502")
def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """An Euler step below the next level, then fresh noise that brings x back up to it.

    Song et al. 2020, equations 12 and 16, in sigma space; `sample_euler_ancestral` of k-diffusion. One evaluation a
    step. Draws randn(x.shape) at each step but the one that ends at 0; nothing with eta 0.

    eta: how much of the noise is renewed, from 0 (none: Euler's method) by way of 1 (as much as in DDPM) up, until all
    of it is. s_noise: the noise's standard deviation, 0 or more, 1 by the theory.
    """
    check_amounts(eta=eta, s_noise=s_noise)
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        x = x + (x - denoised) / sigma * (down - sigma)
        x = add_noise(x, s_noise * up, generator)
        yield Step(x, denoised, sigma_next)
