"""Samplers solve the equation: orders of convergence, and the distribution that comes out."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from peers import distance
from sampling import STOCHASTIC, WITH_ETA, bells, every, noise, run
from scipy.integrate import solve_ivp
from torch import Tensor

from sdxl_ref.diffusion.samplers import SAMPLERS


def exact_flow(x: Tensor, high: float, low: float) -> Tensor:
    """dx/dlambda = denoised - x from the level `high` down to `low`, by a Runge-Kutta method of order 8."""

    def slope(lam: float, flat: np.ndarray) -> np.ndarray:
        here = torch.from_numpy(flat)
        sigma = torch.tensor(math.exp(-lam), dtype=torch.float64)
        return (bells(here, sigma) - here).numpy()

    ends = (-math.log(high), -math.log(low))
    return torch.from_numpy(solve_ivp(slope, ends, x.numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1])


def log_levels(steps: int, high: float = 10.0, low: float = 0.2) -> Tensor:
    return torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)


START = torch.linspace(-20, 20, 41, dtype=torch.float64)
FLOW = exact_flow(START, 10.0, 0.2)
ORDERS = {  # of convergence; at least 1 for any other
    "heun": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_3m_sde": 2,  # despite its name: see its docstring
    "lms": 3,  # here: of order 4 inside, but its first steps are of lower order
    "unipc": 3,  # the predictor of order 2 with its corrector
}
SLACK = 0.1  # of the order, measured between 32 and 64 steps


def error(name: str, steps: int, **options: Any) -> float:
    return distance(run(name, bells, START, log_levels(steps), **options)[-1].x, FLOW)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name in WITH_ETA or name not in STOCHASTIC])
def test_order_of_convergence(name: str) -> None:
    options = {"eta": 0.0} if name in WITH_ETA else {}
    order = math.log2(error(name, 32, **options) / error(name, 64, **options))
    assert order >= ORDERS.get(name, 1) - SLACK


def test_dpmpp_3m_sde_is_of_second_order() -> None:
    assert math.log2(error("dpmpp_3m_sde", 64, eta=0.0) / error("dpmpp_3m_sde", 128, eta=0.0)) <= 2 + SLACK


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_raises_unipcs_order_by_one(order: int) -> None:
    measured = math.log2(error("unipc", 32, order=order) / error("unipc", 64, order=order))
    assert abs(measured - (order + 1)) <= SLACK


@every
def test_the_distribution_comes_out(name: str) -> None:
    """Mean and spread of a bell at 0.5 from 100,000 draws: a stochastic sampler adds as much noise as it should."""
    middle, spread, count = 0.5, 0.5, 100_000

    def bell(x: Tensor, sigma: Tensor) -> Tensor:
        return (spread**2 * x + sigma**2 * middle) / (spread**2 + sigma**2)

    sigmas = torch.cat([log_levels(200, 10.0, 0.02), torch.zeros(1, dtype=torch.float64)])
    x = middle + noise(count) * math.sqrt(spread**2 + 10.0**2)
    last = run(name, bell, x, sigmas)[-1].x
    assert abs(float(last.mean()) - middle) <= 0.01
    assert abs(float(last.std()) / spread - 1) <= 0.02  # 200 steps of first order miss 1.5% of it
