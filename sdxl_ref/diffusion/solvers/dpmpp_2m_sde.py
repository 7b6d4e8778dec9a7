"""SDE-DPM-Solver++(2M)."""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.higher_order import lambdas
from sdxl_ref.diffusion.steps import Denoise, Step, add_noise, check_amounts, levels, sampler
from sdxl_ref.noise import Generator

SOLVER_TYPES = ("midpoint", "heun")


@sampler(stochastic=True, evaluations=1, paper="arXiv:2211.01095")
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) of Lu et al. 2022; `sample_dpmpp_2m_sde` of k-diffusion; diffusers' "sde-dpmsolver++".

    It solves dx = (1 + eta) (denoised - x) dlambda + sqrt(2 eta) sigma dw in lambda = -log sigma. With a = (1 + eta) h,
    the linear part and the noise of a step are exact:

        x <- e^-a x + (1 - e^-a) denoised + (correction) + sigma_next sqrt(1 - e^(-2 eta h)) noise

    The previous estimate, r h further up, gives the correction, which raises the order to 2. One evaluation a step. The
    first step and one that ends at 0 have no correction: the rule of k-diffusion, and at order 2 that of diffusers, at
    any number of steps. Draws randn(x.shape) at each step but the one that ends at 0; nothing with eta 0. k-diffusion
    draws the same distribution from a Brownian tree.

    eta: the share of the SDE's noise, from 0 (none: DPM-Solver++(2M)) up, 1 in the paper. s_noise: the noise's standard
    deviation, 0 or more, 1 by the theory. solver_type: "midpoint" takes the slope of the estimate at half of 1 - e^-a,
    "heun" integrates it exactly; they differ by a term of third order.
    """
    check_amounts(eta=eta, s_noise=s_noise)
    if solver_type not in SOLVER_TYPES:
        raise InputError(f"unknown solver type {solver_type!r}: expected one of {', '.join(SOLVER_TYPES)}")
    sigmas = levels(sigmas, x)
    previous: tuple[Tensor, float] | None = None  # the last estimate, and the length h of the last step
    for (sigma, sigma_next), (lam, lam_next) in zip(pairwise(sigmas), pairwise(lambdas(sigmas)), strict=True):
        denoised = denoise(x, sigma)
        h = lam_next - lam
        if math.isinf(h):
            x = denoised.clone()
        else:
            a = (1 + eta) * h
            phi_1 = -math.expm1(-a)
            x = math.exp(-a) * x + phi_1 * denoised
            if previous is not None:
                older, h_older = previous
                slope = (denoised - older) * (h / h_older)
                x = x + (phi_1 / 2 if solver_type == "midpoint" else 1 - phi_1 / a) * slope
            spread = math.exp(-lam_next) * math.sqrt(-math.expm1(-2 * eta * h))  # of the noise, below sigma_next
            x = add_noise(x, s_noise * spread, generator)
            previous = denoised, h
        yield Step(x, denoised, sigma_next)
