"""Whole runs of the higher-order samplers, against diffusers' schedulers and against the equation they solve.

The peers work at unit variance, on x / sqrt(1 + sigma^2), and are handed our levels, our estimates and our noise.
"""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LMSDiscreteScheduler, UniPCMultistepScheduler
from peers import distance
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.diffusion.solvers.dpmpp_3m_sde import differences
from sdxl_ref.diffusion.solvers.lms import lms_coefficients
from sdxl_ref.diffusion.solvers.unipc import weights

RUN = 2e-6  # relative L2 distance after a whole run in float32; the largest seen is 1e-6, over the sweep
EXACT_RUN = 1e-13  # the same in float64; the largest seen is 6e-15
DIFFERENT = 1e-4  # far from rounding; the smallest seen is 9e-4
STEPS = (15, 20, 33)
ETAS = (0.0, 0.5, 1.0, 1.7)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for two bells at -1 and 1 of variance 1/4, in the dtype of x."""
    variance = sigma.to(x.dtype) ** 2
    return (0.25 * x + variance * torch.tanh(x / (0.25 + variance))) / (0.25 + variance)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def beginning(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.randn((2, 4, 8, 8), generator=seeded(0), dtype=torch.float64) * float(sigmas[0])).to(dtype)


def ours(name: str, sigmas: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    *_, last = SAMPLERS[name](denoise, beginning(sigmas, dtype), sigmas, generator=seeded(), **options)
    return last.x


def theirs(cls: Any, sigmas: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    scheduler = cls(prediction_type="sample", **options)
    steps = len(sigmas) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = sigmas.to(dtype), torch.arange(steps, 0, -1)
    takes_noise = "variance_noise" in inspect.signature(scheduler.step).parameters
    x, generator = beginning(sigmas, dtype), seeded()
    for t, (sigma, sigma_next) in zip(scheduler.timesteps, itertools.pairwise(scheduler.sigmas), strict=True):
        noise = {"variance_noise": torch.randn(x.shape, generator=generator)} if takes_noise else {}
        after = scheduler.step(denoise(x, sigma), t, x / torch.sqrt(1 + sigma**2), **noise).prev_sample
        x = after * torch.sqrt(1 + sigma_next**2)
    return x


PEERS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "dpmpp_2m": ("dpmpp_2m", DPMSolverMultistepScheduler, {}, {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", DPMSolverMultistepScheduler, {}, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde heun": (
        "dpmpp_2m_sde",
        DPMSolverMultistepScheduler,
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "unipc": ("unipc", UniPCMultistepScheduler, {}, {}),
    "unipc 1": ("unipc", UniPCMultistepScheduler, {"order": 1}, {"solver_order": 1}),
    "unipc 3": ("unipc", UniPCMultistepScheduler, {"order": 3}, {"solver_order": 3}),
}


def gap(peer: str, steps: int, karras: bool, dtype: torch.dtype, spacing: str = "leading") -> float:
    """Between the ends of both runs. The last level is 0, where both end on the estimate: at any number of steps."""
    name, cls, our_options, their_options = PEERS[peer]
    sigmas = NoiseSchedule().discretize(steps, spacing, karras)
    return distance(ours(name, sigmas, dtype, **our_options), theirs(cls, sigmas, dtype, **their_options))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True], ids=["leading", "karras"])
def test_a_run_is_that_of_diffusers(peer: str, steps: int, karras: bool) -> None:
    assert gap(peer, steps, karras, torch.float32) <= RUN


@pytest.mark.parametrize("peer", ["unipc", "unipc 1", "unipc 3"])  # diffusers' DPM-Solver rounds x to float32
@pytest.mark.parametrize("karras", [False, True], ids=["leading", "karras"])
def test_unipc_in_float64_is_that_of_diffusers(peer: str, karras: bool) -> None:
    assert gap(peer, 20, karras, torch.float64) <= EXACT_RUN


@pytest.mark.sweep
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "sgm"])
@pytest.mark.parametrize("karras", [False, True], ids=["plain", "karras"])
def test_runs_of_any_length_are_those_of_diffusers(peer: str, spacing: str, karras: bool) -> None:
    for steps in (2, 3, 4, 5, 8, 10, 14, 15, 25, 50, 100):
        assert gap(peer, steps, karras, torch.float32, spacing) <= RUN, steps


@pytest.mark.parametrize("karras", [False, True], ids=["leading", "karras"])
def test_lms_is_that_of_diffusers(karras: bool) -> None:
    """Its `step` takes x in sigma space."""
    sigmas = NoiseSchedule().discretize(20, karras=karras)
    scheduler = LMSDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(20)
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.arange(20, 0, -1)
    x = beginning(sigmas, torch.float32)
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        scheduler.is_scale_input_called = True
        x = scheduler.step(denoise(x, sigma), t, x).prev_sample
    assert distance(ours("lms", sigmas, torch.float32), x) <= RUN


# The reverse SDE, integrated independently

NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)


def weighted_mean(rate: float, power: int) -> float:
    """The integral of rate e^(-rate (1 - u)) u^power over u from 0 to 1, by quadrature."""
    u = (NODES + 1) / 2
    return float((WEIGHTS / 2 * rate * np.exp(-rate * (1 - u)) * u**power).sum())


def polynomial(lams: list[float], values: list[Tensor]) -> list[Tensor]:
    """Coefficients, from the constant up, of the polynomial through the values, in powers of lambda - lams[0]."""
    powers = np.vander(np.array(lams) - lams[0], increasing=True)
    inverse = torch.from_numpy(np.linalg.inv(powers))
    return list(torch.einsum("kn,n...->k...", inverse, torch.stack(values)))


def sde(sigmas: Tensor, order: int, eta: float, rule: str) -> Tensor:
    """dx = (1 + eta) (D - x) dlambda + noise, D the polynomial through the last `order` estimates; in float64.

    rule "exact": each term of D is integrated. "midpoint": the linear one is taken at the middle of the whole weight.
    "half": the quadratic one counts half, as k-diffusion has it.
    """
    x, generator = beginning(sigmas, torch.float64), seeded()
    lams: list[float] = []
    estimates: list[Tensor] = []
    for sigma, sigma_next in itertools.pairwise(sigmas.double().tolist()):
        lams = [-math.log(sigma), *lams][:order]
        estimates = [denoise(x, torch.tensor(sigma)), *estimates][:order]
        if sigma_next == 0:
            return estimates[0]
        h = -math.log(sigma_next) - lams[0]
        rate = (1 + eta) * h
        x = math.exp(-rate) * x
        for power, coefficient in enumerate(polynomial(lams, estimates)):
            integral = weighted_mean(rate, power)
            if rule == "midpoint" and power == 1:
                integral = weighted_mean(rate, 0) / 2
            if rule == "half" and power == 2:
                integral = integral / 2
            x = x + integral * h**power * coefficient
        if eta > 0:
            noise = torch.randn(x.shape, generator=generator).double()
            x = x + math.sqrt(sigma_next**2 - (sigma_next * math.exp(-eta * h)) ** 2) * noise
    return x


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_sde_solves_the_sde(eta: float, steps: int) -> None:
    sigmas = NoiseSchedule().discretize(steps)
    for solver_type, rule in (("midpoint", "midpoint"), ("heun", "exact")):
        ended = ours("dpmpp_2m_sde", sigmas, torch.float64, eta=eta, solver_type=solver_type)
        assert distance(ended, sde(sigmas, 2, eta, rule)) <= EXACT_RUN


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True], ids=["leading", "karras"])
def test_dpmpp_3m_sde_solves_the_sde(eta: float, steps: int, karras: bool) -> None:
    """But for half of the quadratic term, which the docstring owns up to."""
    sigmas = NoiseSchedule().discretize(steps, karras=karras)
    ended = ours("dpmpp_3m_sde", sigmas, torch.float64, eta=eta)
    assert distance(ended, sde(sigmas, 3, eta, "half")) <= EXACT_RUN
    assert distance(ended, sde(sigmas, 3, eta, "exact")) > DIFFERENT


def test_at_eta_0_the_sde_is_the_ode() -> None:
    sigmas = NoiseSchedule().discretize(20)
    assert (
        distance(ours("dpmpp_2m_sde", sigmas, torch.float32, eta=0.0), ours("dpmpp_2m", sigmas, torch.float32)) <= RUN
    )


def test_an_unknown_solver_type() -> None:
    with pytest.raises(InputError, match="unknown solver type 'euler': expected one of midpoint, heun"):
        ours("dpmpp_2m_sde", NoiseSchedule().discretize(3), torch.float32, solver_type="euler")


def test_differences_of_a_parabola() -> None:
    """1 + 2 lambda + 3 lambda^2, in units of h: slope 2 h + 6 lambda h, and 3 h^2, half of the second derivative."""
    lams, h = (0.7, 0.4, -0.2), 0.5
    history = [(lam, torch.tensor([1 + 2 * lam + 3 * lam**2], dtype=torch.float64)) for lam in lams]
    d1, d2 = differences(history, h)
    assert float(d1) == pytest.approx((2 + 6 * 0.7) * h)
    assert float(d2) == pytest.approx(3 * h**2)
    d1, d2 = differences(history[:2], h)
    assert float(d1) == pytest.approx(float(history[0][1] - history[1][1]) / 0.3 * h)
    assert d2 == 0
    assert all(d == 0 for d in differences(history[:1], h))


# The ancestral method of second order


@pytest.mark.parametrize("eta", ETAS)
def test_dpmpp_2s_ancestral_is_the_papers(eta: float) -> None:
    """Lu et al. 2022, algorithm 1 with r_1 = 1/2, to the lower end of the step; in float64."""
    sigmas = NoiseSchedule().discretize(20)
    x, generator = beginning(sigmas, torch.float64), seeded()
    for s, s_next in itertools.pairwise(sigmas.double().tolist()):
        estimate = denoise(x, torch.tensor(s))
        up = min(s_next, eta * s_next * math.sqrt(1 - (s_next / s) ** 2))
        down = math.sqrt(s_next**2 - up**2)
        if down > 0:
            middle = math.sqrt(s * down)
            u = middle / s * x + (1 - middle / s) * estimate
            estimate = denoise(u, torch.tensor(middle))
        x = down / s * x + (1 - down / s) * estimate
        if up > 0:
            x = x + up * torch.randn(x.shape, generator=generator).double()
    ended = ours("dpmpp_2s_ancestral", sigmas, torch.float64, eta=eta)
    assert distance(ended, x) <= RUN  # its coefficients are float32


def test_at_eta_1_dpmpp_2s_ancestral_evaluates_on_the_grid() -> None:
    """So that each evaluation has the training step of its level, and belongs to one side of a hand-off."""
    sigmas, seen = NoiseSchedule().discretize(20, karras=True), []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return denoise(x, sigma)

    list(SAMPLERS["dpmpp_2s_ancestral"](record, beginning(sigmas, torch.float32), sigmas, generator=seeded()))
    assert seen == [level for pair in itertools.pairwise(sigmas.tolist()) for level in pair][:-1]


# LMS and UniPC inside


def test_lms_coefficients_integrate_polynomials() -> None:
    nodes, start, stop = np.array([3.0, 3.7, 5.0, 8.0]), 3.0, 2.2
    for power in range(4):
        total = sum(c * n**power for c, n in zip(lms_coefficients(nodes, start, stop), nodes, strict=True))
        assert total == pytest.approx((stop ** (power + 1) - start ** (power + 1)) / (power + 1))


@pytest.mark.parametrize("r", [[-0.8, 1.0], [-0.8, -1.9], [-0.8, -1.9, 1.0]], ids=str)
@pytest.mark.parametrize("h", [0.02, 0.5, 3.0])
def test_unipc_weights_integrate_polynomials(r: list[float], h: float) -> None:
    for power in range(1, len(r) + 1):
        total = sum(rho * node ** (power - 1) for rho, node in zip(weights(r, h), r, strict=True))
        assert total == pytest.approx(weighted_mean(h, power) / weighted_mean(h, 0), rel=1e-9)


def test_unipc_takes_a_half_for_a_single_weight() -> None:
    assert weights([], 0.5) == []
    assert weights([-0.8], 0.5) == weights([1.0], 0.5) == [0.5]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_keeps_what_is_written_into_x(order: int) -> None:
    """With estimates that do not depend on x, it shrinks by sigma_next / sigma at each step and by nothing else."""
    sigmas = NoiseSchedule().discretize(12)[:-1]
    x = beginning(sigmas, torch.float64)

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cos(x.new_ones(x.shape) * sigma)

    def run(written: float) -> Tensor:
        for i, step in enumerate(SAMPLERS["unipc"](estimate, x, sigmas, order=order)):
            if i == 4:
                step.x.add_(written)
        return step.x

    assert float((run(3.0) - run(0.0)).mean()) == pytest.approx(3.0 * float(sigmas[-1] / sigmas[5]))


@pytest.mark.parametrize("order", [0, 4, -1, 1.5, None])
def test_unipc_has_the_orders_1_to_3(order: Any) -> None:
    with pytest.raises(InputError, match=f"the order must be one of 1, 2, 3, found {order}"):
        ours("unipc", NoiseSchedule().discretize(3), torch.float32, order=order)
