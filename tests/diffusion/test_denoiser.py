"""`Prediction` against its formulas, for the noise and for v; `Denoiser`, which calls the network and nothing else."""

import math

import pytest
import torch
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser, Prediction
from sdxl_ref.diffusion.schedule import NoiseSchedule

EXACT = 1e-12  # float64
LEVELS = [0.03, 0.7, 1.0, 14.6]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 3, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


# --- prediction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_network_reads_x_with_variance_1(sigma: float) -> None:
    """sqrt(abar) x0 + sqrt(1 - abar) noise, with sigma^2 = (1 - abar) / abar."""
    x0 = noise(0)
    eps = noise(1)
    abar = 1 / (1 + sigma**2)
    expected = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
    close(Prediction.scale_in(x0 + sigma * eps, torch.tensor(sigma, dtype=torch.float64)), expected)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_target_is_that_of_the_papers(kind: str, sigma: float) -> None:
    """The noise (Ho et al. 2020); v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho 2022, appendix D)."""
    x0 = noise(0)
    eps = noise(1)
    abar = 1 / (1 + sigma**2)
    expected = eps if kind == "epsilon" else math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
    close(Prediction(kind).target(x0, eps, torch.tensor(sigma, dtype=torch.float64)), expected)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_estimate_of_x0_is_that_of_the_papers(kind: str, sigma: float) -> None:
    """From the noise: x - sigma noise. From v: sqrt(abar) z - sqrt(1 - abar) v, with z as the network reads x."""
    x = noise(0)
    output = noise(1)
    abar = 1 / (1 + sigma**2)
    level = torch.tensor(sigma, dtype=torch.float64)
    z = Prediction.scale_in(x, level)
    expected = x - sigma * output if kind == "epsilon" else math.sqrt(abar) * z - math.sqrt(1 - abar) * output
    close(Prediction(kind).denoised(x, output, level), expected)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_a_network_that_hits_the_target_gives_x0(kind: str, sigma: float) -> None:
    prediction = Prediction(kind)
    x0 = noise(0)
    eps = noise(1)
    level = torch.tensor(sigma, dtype=torch.float64)
    close(prediction.denoised(x0 + sigma * eps, prediction.target(x0, eps, level), level), x0)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_levels_of_a_batch_may_differ(kind: str) -> None:
    """As in training: sigma (b,1,1,1)."""
    prediction = Prediction(kind)
    x0 = noise(0)
    eps = noise(1)
    levels = torch.tensor([0.3, 5.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    both = prediction.target(x0, eps, levels)
    for i in range(2):
        close(both[i], prediction.target(x0[i], eps[i], levels[i]))
    close(prediction.denoised(x0 + levels * eps, both, levels), x0)


def test_levels_of_training_steps_and_back() -> None:
    schedule = NoiseSchedule()
    steps = torch.tensor([0, 199, 999])
    levels = Prediction.sigma(steps)
    assert torch.equal(levels, schedule.sigmas[steps])
    assert [round(Prediction().timestep(float(level)), 3) for level in levels] == [0, 199, 999]


# --- denoiser -----------------------------------------------------------------------------------------------------


class Network:
    """Keeps what it is given, and returns a fixed output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        self.seen: list[tuple[Tensor, ...]] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x, t, context, y))
        return self.output.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_denoiser_scales_calls_and_reads_the_answer(kind: str, dtype: torch.dtype) -> None:
    """x goes in in the context's dtype, what comes out is in x's own; the step is float32, one for each picture."""
    x = 3 * noise(0).float()
    output = noise(1)
    context = noise(2, 2, 77, 8).to(dtype)
    y = noise(3, 2, 6).float()
    sigma = torch.tensor(2.5)
    prediction = Prediction(kind, timestep=lambda level: 100 * level)
    network = Network(output)
    found = Denoiser(network, prediction, Conditioning(context, y))(x, sigma)
    [(given, t, given_context, given_y)] = network.seen
    assert torch.equal(given, (x / torch.sqrt(sigma**2 + 1)).to(dtype))
    assert t.tolist() == [250.0, 250.0]
    assert t.dtype == torch.float32
    assert given_context is context
    assert given_y is y
    assert found.dtype == torch.float32
    assert torch.equal(found, prediction.denoised(x, output.to(dtype).float(), sigma))
