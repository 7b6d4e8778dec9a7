"""DPM-Solver++(2S) with ancestral noise."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sdxl_ref.diffusion.higher_order import ancestral
from sdxl_ref.diffusion.steps import Denoise, Step, add_noise, check_amounts, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=True, evaluations=2, paper="arXiv:2211.01095")
def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(2S) below the next level, then fresh noise that brings x back up to it.

    Lu et al. 2022, algorithm 1 with r = 1/2, and the noise of `euler_ancestral`; `sample_dpmpp_2s_ancestral` of
    k-diffusion. Two evaluations a step: the second is due halfway in log sigma between the level and the lower end of
    the ancestral step. A step whose lower end is 0 is Euler's, with one. Draws randn(x.shape) at each step but the one
    that ends at 0; nothing with eta 0.

    eta: from 0 (none of the noise is renewed) up, 1 as in DDPM. s_noise: the noise's standard deviation, 0 or more.
    """
    check_amounts(eta=eta, s_noise=s_noise)
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
        else:
            h = torch.log(sigma) - torch.log(down)
            middle = sigma_next if eta == 1 else torch.sqrt(sigma * down)  # at eta 1 a level of the grid, exactly
            halfway = middle / sigma * x - torch.expm1(-h / 2) * denoised
            x = down / sigma * x - torch.expm1(-h) * denoise(halfway, middle)
        x = add_noise(x, s_noise * up, generator)
        yield Step(x, denoised, sigma_next)
