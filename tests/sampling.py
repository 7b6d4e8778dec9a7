"""A stand-in for a network, generators, and what the tests of all samplers read from the registry."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.diffusion.steps import Step

STEP = 5e-7  # relative L2 distance of one float32 step
MEAN = 1.0
VARIANCE = 0.25  # of the toy's data: two bells, at -MEAN and MEAN
CONTRACT = {  # draws noise by default, evaluations a step
    "euler": (False, 1),
    "euler_ancestral": (True, 1),
    "ddim": (False, 1),
    "ddpm": (True, 1),
    "dpmpp_2m": (False, 1),
    "dpmpp_2m_sde": (True, 1),
    "dpmpp_2s_ancestral": (True, 2),
    "dpmpp_3m_sde": (True, 1),
    "heun": (False, 2),
    "lms": (False, 1),
    "unipc": (False, 1),
}
STOCHASTIC = {name for name in SAMPLERS if SAMPLERS[name].stochastic}
OPTIONS = {name: set(inspect.signature(SAMPLERS[name]).parameters) for name in SAMPLERS}
WITH_ETA = [name for name in SAMPLERS if "eta" in OPTIONS[name]]
WITH_CHURN = [name for name in SAMPLERS if "s_churn" in OPTIONS[name]]


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear stand-in for a network, of operations that IEEE rounds alike in every position of a tensor."""
    return 0.7 * x / (1 + x * x) + 0.3 * x / (1 + sigma * sigma)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A denoiser that keeps what it was called with."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.x.append(x.clone())
        self.sigmas.append(sigma)
        return denoise(x, sigma)


every = pytest.mark.parametrize("name", list(SAMPLERS))


def run(
    name: str, network: Callable[..., Tensor], x: Tensor, sigmas: Tensor, generator: Any = None, **options: Any
) -> list[Step]:
    needed = seeded() if generator is None and name in STOCHASTIC else generator
    return list(SAMPLERS[name](network, x, sigmas, generator=needed, **options))


def draws(name: str, sigmas: Tensor, **options: Any) -> int:
    """How often a run draws randn(x.shape), by the state that it leaves the generator in."""
    x, generator, replay = noise(1, 4, 8, 8) * sigmas[0], seeded(5), seeded(5)
    run(name, denoise, x, sigmas, generator, **options)
    for count in range(10 * len(sigmas)):
        if torch.equal(generator.get_state(), replay.get_state()):
            return count
        torch.randn(x.shape, generator=replay)
    raise AssertionError(f"{name} draws something else than randn(x.shape)")


SIGMAS = NoiseSchedule().discretize(6)


def bells(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for the toy's data, in closed form."""
    total = VARIANCE + sigma.to(x.dtype) ** 2
    return (VARIANCE * x + (total - VARIANCE) * MEAN * torch.tanh(MEAN * x / total)) / total
