"""DPM-Solver++(2M)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sdxl_ref.diffusion.steps import Denoise, Step, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=False, evaluations=1, paper="arXiv:2211.01095")
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M): Lu et al. 2022, algorithm 2, in lambda = -log sigma; `sample_dpmpp_2m` of k-diffusion.

    One evaluation a step; the previous estimate raises the order to 2. The first step is of first order, and so is a
    step that ends at 0, as its lambda is infinite: the rule of k-diffusion, and at order 2 that of diffusers, at any
    number of steps. Draws no noise.
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
