"""Samplers: pure functions of `(denoise, x, sigmas)`, one per algorithm, in sigma space; and the registry of them all.

Euler's method, the usual one, stands here; each other one in its own file of the package `solvers`.
"""

import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pkgutil import iter_modules

from torch import Tensor

from sdxl_ref.diffusion.steps import Denoise, Sampler, Step, check_amounts, churn, churn_gammas, levels, sampler
from sdxl_ref.noise import Generator


@sampler(stochastic=False, evaluations=1, paper="arXiv:2206.00364")
def euler(
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
    """Euler's method on dx/dsigma = (x - denoised) / sigma, after Karras' churn.

    Karras et al. 2022, algorithm 2 without its correction; `EulerEDMSampler` of the official code and `sample_euler`
    of k-diffusion. One evaluation a step. Draws randn(x.shape) only with churn: before each step whose level is raised,
    the one that ends at 0 too.

    s_churn: from 0 (none) up. It is spread over the n steps: a level is raised by gamma = s_churn / n, at most
    sqrt(2) - 1. s_tmin, s_tmax: only levels within this range are raised. A level raised above the schedule's highest
    is outside of what a network has learnt. s_noise: the noise's standard deviation, 0 or more, 1 by the theory.
    """
    check_amounts(s_churn=s_churn, s_noise=s_noise)
    sigmas = levels(sigmas, x)
    gammas = churn_gammas(sigmas, s_churn, s_tmin, s_tmax)
    for (sigma, sigma_next), gamma in zip(pairwise(sigmas), gammas, strict=True):
        x, sigma_hat = churn(x, sigma, gamma, s_noise, generator)
        denoised = denoise(x, sigma_hat)
        x = x + (x - denoised) / sigma_hat * (sigma_next - sigma_hat)
        yield Step(x, denoised, sigma_next)


class Samplers(Mapping[str, Sampler]):
    """Samplers by name: `euler`, then one for each file of a package, sorted.

    The file NAME.py holds the function NAME. Only the folder is listed: a file is imported when its sampler is asked
    for, by `SAMPLERS["NAME"]`, and not by `in`, `len` or a loop over the names. KeyError for any other name.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        spec = find_spec(package)  # looks the package up without importing it
        files = iter_modules(spec.submodule_search_locations if spec else [])
        self._names = ["euler", *sorted(file.name for file in files)]

    def __getitem__(self, name: str) -> Sampler:
        if name == "euler":
            return euler
        if name not in self._names:
            raise KeyError(name)
        module = import_module(f"{self._package}.{name}")  # the one place that imports a solver
        return getattr(module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


SAMPLERS = Samplers("sdxl_ref.diffusion.solvers")
