"""What several solvers share besides, and Euler's method does not need.

lambda = -log sigma and h, its length in a step, are the symbols of Lu et al. 2022 (arXiv:2211.01095).
"""

import math

import torch
from torch import Tensor


def lambdas(sigmas: Tensor) -> list[float]:
    """-log sigma of each level, in float64; infinite at 0."""
    return [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas.tolist()]


def ancestral(sigma: Tensor, sigma_next: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Where a step goes down to, and the spread of the noise that leads back: down^2 + up^2 = sigma_next^2.

    Song et al. 2020, equation 16, in sigma space: up = eta * sigma_next * sqrt(1 - (sigma_next / sigma)^2), at most
    sigma_next (k-diffusion's `get_ancestral_step`). At eta 0, down is exactly sigma_next; at eta 1 it is
    sigma_next^2 / sigma. Both are 0 for a step that ends at 0.
    """
    share = (sigma_next / sigma) ** 2
    down = sigma_next * torch.sqrt(((1 - eta**2) + eta**2 * share).clamp(min=0))
    up = sigma_next * (eta * torch.sqrt(1 - share)).clamp(max=1)
    return down, up
