"""Options of samplers: eta, s_noise and churn do what the papers say, and nothing where they are 0."""

import itertools
import math
from typing import Any

import pytest
import torch
from peers import distance
from sampling import OPTIONS, SIGMAS, STEP, WITH_CHURN, WITH_ETA, bells, denoise, draws, every, noise, run, seeded
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import NoiseSchedule

# Options

VALUES: dict[str, list[Any]] = {
    "eta": [0.0, 0.5, 1.5],
    "s_noise": [0.0, 0.9],
    "s_churn": [4.0, 1e3],
    "solver_type": ["heun"],
    "order": [1, 3],
}
CHANGED = [
    (name, {option: value})
    for name in SAMPLERS
    for option in VALUES
    if option in OPTIONS[name]
    for value in VALUES[option]
]


def assert_a_whole_run(name: str, x: Tensor, sigmas: Tensor, **options: Any) -> None:
    """A finite step for each interval, and each image from its own generator as if it were alone."""
    together = run(name, denoise, x, sigmas, [seeded(11), seeded(12)], **options)
    assert torch.equal(torch.stack([step.sigma for step in together]), sigmas[1:])
    assert all(step.x.isfinite().all() and step.x.dtype == x.dtype for step in together)
    for i, seed in enumerate((11, 12)):
        alone = run(name, denoise, x[i : i + 1], sigmas, seeded(seed), **options)
        assert all(torch.equal(a.x[0], b.x[i]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("name", "options"), CHANGED)
def test_a_run_with_another_option(name: str, options: dict[str, Any]) -> None:
    x = noise(2, 4, 8, 8) * SIGMAS[0]
    assert_a_whole_run(name, x, SIGMAS, **options)


@pytest.mark.sweep
@every
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_with_all_options_together(name: str, karras: bool, dtype: torch.dtype) -> None:
    mine = {option: [None, *VALUES[option]] for option in VALUES if option in OPTIONS[name]}
    for steps, values in itertools.product((1, 2, 3, 15, 100), itertools.product(*mine.values())):
        options = {option: value for option, value in zip(mine, values, strict=True) if value is not None}
        sigmas = NoiseSchedule().discretize(steps, karras=karras)
        x = (noise(2, 4, 8, 8) * sigmas[0]).to(dtype)
        for part in (sigmas, sigmas[steps // 2 :]):
            assert_a_whole_run(name, x, part, **options)


@pytest.mark.parametrize("name", WITH_ETA)
def test_eta_0_draws_nothing_and_needs_no_generator(name: str) -> None:
    x = noise(1, 4, 8, 8) * SIGMAS[0]
    assert draws(name, SIGMAS, eta=0.0) == 0
    without = list(SAMPLERS[name](denoise, x, SIGMAS, eta=0.0))
    assert torch.equal(without[-1].x, run(name, denoise, x, SIGMAS, seeded(), eta=0.0)[-1].x)


@pytest.mark.parametrize("name", WITH_ETA)
@pytest.mark.parametrize("eta", [1e-3, 0.5, 1.0, 2.0])
def test_noise_is_drawn_above_eta_0(name: str, eta: float) -> None:
    assert draws(name, SIGMAS, eta=eta) == len(SIGMAS) - 2
    with pytest.raises(ValueError, match=r"hand in a torch\.Generator"):
        list(SAMPLERS[name](denoise, noise(1, 4, 8, 8), SIGMAS, eta=eta))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "s_noise" in OPTIONS[name] and name not in WITH_CHURN])
def test_s_noise_scales_the_noise(name: str) -> None:
    """After one step x is linear in it."""
    x, options = noise(1, 4, 8, 8).double() * SIGMAS[0], {"eta": 0.8} if name in WITH_ETA else {}
    bare, half, whole = (run(name, bells, x, SIGMAS[:2], seeded(), s_noise=s, **options)[0].x for s in (0.0, 0.5, 1.0))
    assert not torch.equal(bare, whole)
    assert distance(half - bare, (whole - bare) / 2) <= STEP


@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n in SAMPLERS for o in ("eta", "s_noise", "s_churn") if o in OPTIONS[n]]
)
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_an_amount_is_at_least_0(name: str, option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{option} must be a number from 0 to a million, found {value}"):
        run(name, denoise, noise(1, 4, 8, 8), SIGMAS, seeded(), **{option: value})


def test_ddim_and_ddpm_are_euler_and_ancestral() -> None:
    """Bit for bit."""
    x = noise(2, 4, 8, 8) * SIGMAS[0]
    pairs = [(run("ddim", denoise, x, SIGMAS), run("euler", denoise, x, SIGMAS))]
    pairs += [(run("euler_ancestral", denoise, x, SIGMAS, eta=0.0), run("euler", denoise, x, SIGMAS))]
    pairs += [(run("ddpm", denoise, x, SIGMAS), run("euler_ancestral", denoise, x, SIGMAS))]
    for options in ({"eta": 0.4}, {"eta": 1.0, "s_noise": 1.1}):
        ancestral = run("euler_ancestral", denoise, x, SIGMAS, **options)
        pairs.append((run("ddim", denoise, x, SIGMAS, seeded(), **options), ancestral))
    for one, other in pairs:
        assert all(torch.equal(a.x, b.x) for a, b in zip(one, other, strict=True))


# Churn


@pytest.mark.parametrize("name", WITH_CHURN)
def test_churn_draws_at_the_levels_within_its_range(name: str) -> None:
    levels = SIGMAS[:-1].tolist()
    assert draws(name, SIGMAS, s_churn=1.0) == len(levels)  # before the step that ends at 0 too
    assert draws(name, SIGMAS, s_churn=1.0, s_tmin=levels[3], s_tmax=levels[1]) == 3  # the ends belong to it
    assert draws(name, SIGMAS, s_churn=1.0, s_tmin=5.0, s_tmax=2.0) == 0
    assert draws(name, SIGMAS, s_churn=0.0) == 0


@pytest.mark.parametrize("name", WITH_CHURN)
def test_churn_needs_a_generator(name: str) -> None:
    with pytest.raises(ValueError, match=r"hand in a torch\.Generator"):
        list(SAMPLERS[name](denoise, noise(1, 4, 8, 8), SIGMAS, s_churn=1.0))


@pytest.mark.parametrize("name", WITH_CHURN)
def test_no_level_in_reach_of_the_churn_is_a_run_without(name: str) -> None:
    x = noise(1, 4, 8, 8) * SIGMAS[0]
    plain = run(name, denoise, x, SIGMAS)
    for options in ({"s_churn": 0.0, "s_noise": 2.0}, {"s_churn": 3.0, "s_tmin": 100.0}):
        assert torch.equal(run(name, denoise, x, SIGMAS, **options)[-1].x, plain[-1].x)


def churned(
    x: Tensor, sigmas: list[float], generator: torch.Generator, options: tuple[float, ...], heun: bool
) -> Tensor:
    """Karras et al. 2022, algorithm 2, in float64; without lines 9 to 11 for Euler's method."""
    s_churn, s_tmin, s_tmax, s_noise = options
    for t, t_next in itertools.pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            eps = s_noise * torch.randn(x.shape, generator=generator).double()
            x = x + math.sqrt(t_hat**2 - t**2) * eps
        d = (x - bells(x, torch.tensor(t_hat))) / t_hat
        euler = x + (t_next - t_hat) * d
        if heun and t_next != 0:
            d_next = (euler - bells(euler, torch.tensor(t_next))) / t_next
            x = x + (t_next - t_hat) * (d / 2 + d_next / 2)
        else:
            x = euler
    return x


CHURN_RUN = 1e-6  # of levels in float32, raised in float32


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("options", [(3.0, 0.0, math.inf, 1.0), (1e3, 0.1, 6.0, 1.007)], ids=str)
def test_churn_is_that_of_the_paper(name: str, options: tuple[float, ...]) -> None:
    sigmas = NoiseSchedule().discretize(15)
    x = noise(2, 4, 8, 8).double() * sigmas[0]
    named = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), options, strict=True))
    ours = run(name, bells, x, sigmas, seeded(), **named)[-1].x
    assert distance(ours, churned(x, sigmas.tolist(), seeded(), options, name == "heun")) <= CHURN_RUN
