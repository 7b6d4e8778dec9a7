"""DDIM, which in sigma space is Euler's method, with fresh noise or without."""

from collections.abc import Iterator

from torch import Tensor

from sdxl_ref.diffusion.solvers.euler_ancestral import euler_ancestral
from sdxl_ref.diffusion.steps import Denoise, Step, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=False, evaluations=1, paper="arXiv:2010.02502")
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DDIM: Song et al. 2020, equations 12 and 16. In sigma space it is exactly `euler_ancestral` with the same eta.

    With eta 0 it is exactly `euler`, and draws nothing. One evaluation a step. Draws noise as `euler_ancestral`.

    eta: 0 or more, from 0 to 1 in the paper. s_noise: the noise's standard deviation, 0 or more, 1 by the theory.
    """
    return euler_ancestral(denoise, x, sigmas, generator=generator, eta=eta, s_noise=s_noise)
