"""Heun's method."""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from sdxl_ref.diffusion.steps import Denoise, Step, check_amounts, churn, churn_gammas, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=False, evaluations=2, paper="arXiv:2206.00364")
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Heun's second-order method, after Karras' churn: Karras et al. 2022, algorithm 2 (algorithm 1 without churn).

    `HeunEDMSampler` of the official code and `sample_heun` of k-diffusion. Two evaluations a step, the second at the
    next level; the step that ends at 0 is Euler's, with one. Draws noise only with churn.

    s_churn, s_tmin, s_tmax, s_noise: as in `euler`.
    """
    check_amounts(s_churn=s_churn, s_noise=s_noise)
    sigmas = levels(sigmas, x)
    gammas = churn_gammas(sigmas, s_churn, s_tmin, s_tmax)
    for (sigma, sigma_next), gamma in zip(pairwise(sigmas), gammas, strict=True):
        x, sigma_hat = churn(x, sigma, gamma, s_noise, generator)
        denoised = denoise(x, sigma_hat)
        d = (x - denoised) / sigma_hat
        euler = x + d * (sigma_next - sigma_hat)
        if sigma_next > 0:
            d_next = (euler - denoise(euler, sigma_next)) / sigma_next
            x = x + (d + d_next) / 2 * (sigma_next - sigma_hat)
        else:
            x = euler
        yield Step(x, denoised, sigma_next)
