"""DPM-Solver++(3M) for the SDE."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sdxl_ref.diffusion.higher_order import lambdas
from sdxl_ref.diffusion.steps import Denoise, Step, add_noise, check_amounts, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=True, evaluations=1, paper="arXiv:2211.01095")
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(3M) for the SDE: `sample_dpmpp_3m_sde` of k-diffusion, after the solvers of Lu et al. 2022.

    The SDE, its exact linear part and its noise are those of `dpmpp_2m_sde`. With a = (1 + eta) h, and d1, d2 from the
    parabola through the last three estimates (see `differences`), lengths in units of h:

        x <- e^-a x + phi_1 denoised + phi_2 d1 + phi_3 d2 + sigma_next sqrt(1 - e^(-2 eta h)) noise
        phi_1 = 1 - e^-a, phi_2 = 1 - phi_1 / a, phi_3 = 1/2 - phi_2 / a

    One evaluation a step. The first step is of first order, the second is `dpmpp_2m_sde` with "heun", and one that ends
    at 0 takes the estimate itself. That is k-diffusion's rule; diffusers lowers the order of the last two steps of runs
    below 15 steps, and its third-order SDE term ends in - 1/2 where phi_3 has + 1/2. Draws randn(x.shape) at each step
    but the one that ends at 0; nothing with eta 0.

    Despite its name, the method is of second order. The integral of the parabola has phi_3 times twice d2, and the code
    of k-diffusion, of diffusers and of the paper's authors takes it once. So does this one: its pictures are theirs.

    eta, s_noise: as in `dpmpp_2m_sde`.
    """
    check_amounts(eta=eta, s_noise=s_noise)
    sigmas = levels(sigmas, x)
    history: list[tuple[float, Tensor]] = []  # lambda and the estimate there, the newest first
    for (sigma, sigma_next), (lam, lam_next) in zip(pairwise(sigmas), pairwise(lambdas(sigmas)), strict=True):
        denoised = denoise(x, sigma)
        h = lam_next - lam
        history = [(lam, denoised), *history][:3]
        if math.isinf(h):
            x = denoised.clone()
        else:
            a = (1 + eta) * h
            phi_1 = -math.expm1(-a)
            phi_2 = 1 - phi_1 / a
            phi_3 = 1 / 2 - phi_2 / a
            d1, d2 = differences(history, h)
            x = math.exp(-a) * x + phi_1 * denoised + phi_2 * d1 + phi_3 * d2
            spread = math.exp(-lam_next) * math.sqrt(-math.expm1(-2 * eta * h))  # of the noise, below sigma_next
            x = add_noise(x, s_noise * spread, generator)
        yield Step(x, denoised, sigma_next)


def differences(history: list[tuple[float, Tensor]], h: float) -> tuple[Tensor, Tensor]:
    """The slope at the newest estimate, and the second divided difference, of lambda in units of h.

    They belong to the polynomial through up to three estimates; what it has no estimates for is 0.
    """
    (lam, newest), *older = history
    zero = torch.zeros_like(newest)
    if not older:
        return zero, zero
    lam_1, estimate_1 = older[0]
    r_0 = (lam - lam_1) / h
    slope_0 = (newest - estimate_1) / r_0
    if len(older) == 1:
        return slope_0, zero
    lam_2, estimate_2 = older[1]
    r_1 = (lam_1 - lam_2) / h
    slope_1 = (estimate_1 - estimate_2) / r_1
    d2 = (slope_0 - slope_1) / (r_0 + r_1)
    return slope_0 + r_0 * d2, d2
