"""UniPC: one polynomial for the prediction of a step, and one more point for its correction."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.higher_order import lambdas
from sdxl_ref.diffusion.steps import Denoise, Step, levels, sampler
from sdxl_ref.noise import Generator

ORDERS = (1, 2, 3)


@sampler(stochastic=False, evaluations=1, paper="arXiv:2302.04867")
def unipc(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None, order: int = 2
) -> Iterator[Step]:
    """UniPC: Zhao et al. 2023, multistep, on the estimates of x0 ("data prediction"), with B(h) = e^h - 1 ("bh2").

    The authors' `UniPC`, and diffusers' `UniPCMultistepScheduler` with its default options. A step of length h in
    lambda = -log sigma predicts x from the last p estimates (UniP-p). The evaluation there serves the next step, and
    corrects x first (UniC-p, which raises the order to p + 1): one evaluation a step. A step yields the prediction, and
    the correction is added to it, so that what is written into x is kept.

    p grows from 1 with the estimates there are, up to `order`. Where the levels end at 0 it falls to 1 again in the
    last steps: min(order, steps left), as diffusers' `lower_order_final` at any number of steps. The step that ends at
    0 gives the estimate itself. Draws no noise.

    order: p of a full step, 1, 2 or 3.
    """
    if order not in ORDERS:
        raise InputError(f"the order must be one of {', '.join(map(str, ORDERS))}, found {order!r}")
    sigmas = levels(sigmas, x)
    lam = lambdas(sigmas)
    estimates: list[Tensor] = []  # the newest first
    older: list[tuple[float, Tensor]] = []  # the nodes of the last step's prediction; see `contribution`
    predicted = torch.zeros_like(x)  # what they added to x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        h = lam[i + 1] - lam[i]
        if math.isinf(h):
            x = denoised.clone()
        else:
            if i > 0:
                corrected = contribution(lam[i] - lam[i - 1], estimates[0], [*older, (1.0, denoised)])
                x = x + (corrected - predicted)
            estimates = [denoised, *estimates][:order]
            p = order_of_step(i, lam, order)
            older = [((lam[i - m] - lam[i]) / h, estimates[m]) for m in range(1, p)]
            predicted = contribution(h, denoised, older)
            x = math.exp(-h) * x - math.expm1(-h) * denoised + predicted
        yield Step(x, denoised, sigma_next)


def order_of_step(i: int, lam: list[float], order: int) -> int:
    """p of step i: as many estimates as there are, and as many steps as are left before a level of 0."""
    left = len(lam) - 1 - i if math.isinf(lam[-1]) else order
    return min(order, i + 1, left)


def contribution(h: float, start: Tensor, nodes: list[tuple[float, Tensor]]) -> Tensor:
    """What the estimates at `nodes` add to a step that takes the estimate `start` for constant.

    A node is (r, estimate), at lambda = lambda_start + r h. The sum is B(h) rho_m (estimate_m - start) / r_m over m.
    """
    total = torch.zeros_like(start)
    for rho, (r, estimate) in zip(weights([r for r, _ in nodes], h), nodes, strict=True):
        total = total + rho / r * (estimate - start)
    return -math.expm1(-h) * total


def weights(r: list[float], h: float) -> list[float]:
    """rho_m for the nodes r_m (p,): sum of rho_m r_m^(k-1) = b_k for k = 1 to p; a single one is 1/2, b_1 at h = 0.

    b_k is the mean of u^k for u from 0 to 1 under the weight e^(h u). That makes a step exact for polynomials.
    """
    if len(r) < 2:
        return [0.5] * len(r)
    b = [1.0]
    for k in range(1, len(r) + 1):
        b.append(-1 / math.expm1(-h) - k / h * b[k - 1])  # by parts
    powers = np.vander(r, increasing=True).T
    return np.linalg.solve(powers, b[1:]).tolist()
