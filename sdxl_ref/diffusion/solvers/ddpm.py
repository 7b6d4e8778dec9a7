"""DDPM, which in sigma space is Euler's method with fresh noise at each step."""

from collections.abc import Iterator

from torch import Tensor

from sdxl_ref.diffusion.solvers.euler_ancestral import euler_ancestral
from sdxl_ref.diffusion.steps import Denoise, Step, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=True, evaluations=1, paper="arXiv:2006.11239")
def ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None, s_noise: float = 1.0
) -> Iterator[Step]:
    """DDPM: Ho et al. 2020, algorithm 2, with the posterior ("fixed small") variance.

    In sigma space it is exactly `euler_ancestral` with eta 1. One evaluation a step. Draws randn(x.shape) at each step
    but the one that ends at 0.

    s_noise: the noise's standard deviation, 0 or more, 1 by the theory.
    """
    return euler_ancestral(denoise, x, sigmas, generator=generator, eta=1.0, s_noise=s_noise)
