"""Samplers of higher order, in the form of `samplers.py`. They agree with the official code's of the same name."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Denoise
from sdxl_ref.diffusion.samplers import Step, add_noise, ancestral, levels
from sdxl_ref.noise import Generator


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """Heun's second-order method: Karras et al. 2022, algorithm 1, without churn.

    Two evaluations a step, the second at the next level; the last step, to 0, is Euler's. Draws no noise.
    """
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma
        euler = x + d * (sigma_next - sigma)
        if sigma_next > 0:
            d_next = (euler - denoise(euler, sigma_next)) / sigma_next
            x = x + (d + d_next) / 2 * (sigma_next - sigma)
        else:
            x = euler
        yield Step(x, denoised, sigma_next)


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), algorithm 2, in lambda = -log sigma.

    One evaluation a step; the previous estimate raises the order. The last step, to 0, is of first order, as its
    lambda is infinite. Draws no noise.
    """
    previous: tuple[Tensor, Tensor] | None = None  # the last estimate, and the length h of the last step
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised.clone()
        else:
            h = torch.log(sigma) - torch.log(sigma_next)
            estimate = denoised
            if previous is not None:
                older, h_older = previous
                r = h_older / h
                estimate = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * older
            x = sigma_next / sigma * x - torch.expm1(-h) * estimate
            previous = denoised, h
        yield Step(x, denoised, sigma_next)


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2S): Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with r = 1/2, then ancestral noise (eta 1).

    Two evaluations a step. The second is due halfway in log sigma between the level and the lower end of the
    ancestral step, sigma_next^2 / sigma: that is sigma_next itself. The last step, to 0, is Euler's. Draws
    randn(x.shape) at each step but the last.
    """
    for sigma, sigma_next in pairwise(levels(sigmas, x)):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next)
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
        else:
            h = torch.log(sigma) - torch.log(down)
            halfway = sigma_next / sigma * x - torch.expm1(-h / 2) * denoised
            x = down / sigma * x - torch.expm1(-h) * denoise(halfway, sigma_next)
        x = add_noise(x, up, generator)
        yield Step(x, denoised, sigma_next)


LMS_ORDER = 4


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """Linear multistep (Adams-Bashforth on the levels as they are), up to order 4; k-diffusion's `sample_lms`.

    One evaluation a step. The Lagrange polynomials through the last derivatives are integrated exactly, in float64.
    Draws no noise.
    """
    sigmas = levels(sigmas, x)
    nodes = sigmas.cpu().double().numpy()
    history: list[Tensor] = []  # derivatives, the newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        history = [(x - denoised) / sigma, *history][:LMS_ORDER]
        used = nodes[i::-1][: len(history)] if i else nodes[:1]
        for d, coefficient in zip(history, lms_coefficients(used, nodes[i], nodes[i + 1]), strict=True):
            x = x + coefficient * d
        yield Step(x, denoised, sigma_next)


def lms_coefficients(nodes: NDArray[Any], start: float, stop: float) -> list[float]:
    """The integral from `start` to `stop` of each Lagrange basis polynomial on `nodes`."""
    coefficients = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        basis = np.atleast_1d(np.poly(others - start)) / np.prod(node - others)  # in powers of (sigma - start)
        coefficients.append(float(np.polyval(np.polyint(basis), stop - start)))
    return coefficients
