"""What all samplers share, against the formulas."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.higher_order import ancestral, lambdas
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.diffusion.steps import LARGEST_GAMMA, Step, add_noise, check_amounts, churn, churn_gammas, levels, sampler

ROUNDING = 1e-6  # relative, of a few float32 operations
SIGMAS = NoiseSchedule().discretize(20)
PAIRS = list(pairwise(SIGMAS))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.5, 5.0])
def test_ancestral_is_k_diffusions(eta: float) -> None:
    """`get_ancestral_step`, in float64."""
    for sigma, sigma_next in PAIRS:
        a, b = float(sigma), float(sigma_next)
        up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
        our_down, our_up = ancestral(sigma, sigma_next, eta)
        assert float(our_up) == pytest.approx(up, rel=ROUNDING)
        assert float(our_down) == pytest.approx(math.sqrt(b**2 - up**2), rel=ROUNDING, abs=ROUNDING * b)
        assert float(our_down**2 + our_up**2) == pytest.approx(b**2, rel=ROUNDING)


def test_ancestral_at_eta_0_and_1() -> None:
    for sigma, sigma_next in PAIRS:
        down, up = ancestral(sigma, sigma_next, 0.0)
        assert torch.equal(down, sigma_next)
        assert up == 0
        down, _ = ancestral(sigma, sigma_next)
        assert float(down) == pytest.approx(float(sigma_next**2 / sigma), rel=ROUNDING)


def test_a_large_eta_renews_all_of_the_noise() -> None:
    down, up = ancestral(torch.tensor(2.0), torch.tensor(1.0), 10.0)
    assert (float(down), float(up)) == (0.0, 1.0)


def test_ancestral_ends_at_0() -> None:
    for eta in (0.0, 0.5, 1.0, 3.0):
        assert [float(value) for value in ancestral(torch.tensor(2.0), torch.tensor(0.0), eta)] == [0.0, 0.0]


@pytest.mark.parametrize("spread", [0.5, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_noise_of_a_spread(spread: Any, dtype: torch.dtype) -> None:
    x = torch.ones(2, 4, 8, 8, dtype=dtype)
    noisy = add_noise(x, spread, seeded())
    assert torch.equal(noisy, x + spread * torch.randn(x.shape, generator=seeded()).to(dtype))
    assert noisy.dtype == dtype


def test_no_noise_needs_no_generator() -> None:
    x = torch.ones(2, 4)
    for spread in (0.0, torch.tensor(0.0)):
        assert add_noise(x, spread, None) is x
    generator = seeded()
    add_noise(x, 0.0, generator)
    assert torch.equal(generator.get_state(), seeded().get_state())
    with pytest.raises(ValueError, match=r"hand in a torch\.Generator"):
        add_noise(x, 0.1, None)


def test_churn_raises_the_variance_to_the_level_above() -> None:
    sigma, gamma = torch.tensor(2.0), 0.25
    x, sigma_hat = churn(torch.zeros(2, 4), sigma, gamma, 1.1, seeded())
    assert float(sigma_hat) == 2.5
    expected = 1.1 * math.sqrt(2.5**2 - 2.0**2) * torch.randn((2, 4), generator=seeded())
    assert torch.allclose(x, expected, rtol=ROUNDING)


def test_no_churn_hands_back_what_it_got() -> None:
    x, sigma = torch.ones(2, 4), torch.tensor(2.0)
    assert all(a is b for a, b in zip(churn(x, sigma, 0.0, 1.0, None), (x, sigma), strict=True))


def test_gammas_are_karras() -> None:
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    assert churn_gammas(sigmas, 1.0, 0.0, math.inf) == [0.25] * 4
    assert churn_gammas(sigmas, 1.0, 2.0, 4.0) == [0.0, 0.25, 0.25, 0.0]
    assert churn_gammas(sigmas, 99.0, 0.0, math.inf) == [LARGEST_GAMMA] * 4
    assert churn_gammas(sigmas, 0.0, 0.0, math.inf) == [0.0] * 4
    assert pytest.approx(2.0) == (1 + LARGEST_GAMMA) ** 2


def test_lambda_is_minus_log_sigma() -> None:
    assert lambdas(torch.tensor([math.e, 1.0, 0.0])) == pytest.approx([-1.0, 0.0, math.inf], abs=1e-7)


def test_levels_are_float32_on_the_device_of_x() -> None:
    moved = levels(torch.tensor([2.0, 0.0], dtype=torch.float64), torch.zeros(1, device="meta"))
    assert (moved.dtype, moved.device.type) == (torch.float32, "meta")


@pytest.mark.parametrize("value", [-1e-9, -1.0, math.inf, -math.inf, math.nan])
def test_amounts(value: float) -> None:
    check_amounts(eta=0.0, s_noise=3)
    with pytest.raises(InputError, match="s_noise must be a number from 0 to a million"):
        check_amounts(eta=1.0, s_noise=value)


def test_the_decorator_returns_the_function_itself() -> None:
    def stay(denoise: Any, x: Tensor, sigmas: Tensor, *, generator: Any = None, much: float = 2.0) -> Any:
        """Stays."""
        yield Step(x, x, sigmas[0])

    described = sampler(stochastic=True, evaluations=3, paper="arXiv:2206.00364")(stay)
    assert described is stay
    assert (described.stochastic, described.evaluations, described.paper) == (True, 3, "arXiv:2206.00364")
    assert (described.__name__, described.__doc__) == ("stay", "Stays.")
    assert "much" in inspect.signature(described).parameters
