"""A linear multistep method: Adams-Bashforth on the levels as they are."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdxl_ref.diffusion.steps import Denoise, Step, levels, sampler
from sdxl_ref.noise import Generator

LMS_ORDER = 4


@sampler(stochastic=False, evaluations=1, paper="arXiv:2204.13902")
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """Adams-Bashforth up to order 4 on dx/dsigma = (x - denoised) / sigma; `sample_lms` of k-diffusion.

    In sigma space this is rhoAB-DEIS of Zhang & Chen 2022. One evaluation a step. The Lagrange polynomials through the
    last derivatives are integrated exactly, in float64. The first steps have fewer derivatives, the last one, to 0,
    all of them: x does not end on the last estimate. Draws no noise. In image-to-image diffusers weighs the first
    derivatives as if there were four.
    """
    sigmas = levels(sigmas, x)
    nodes = sigmas.cpu().double().numpy()
    history: list[Tensor] = []  # derivatives, the newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        history = [(x - denoised) / sigma, *history][:LMS_ORDER]
        used = nodes[i::-1][: len(history)]
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
