"""Noise levels, grids and strength rules against the formulas, diffusers' schedulers and the official code's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import SPACINGS, NoiseSchedule, strength_steps
from sdxl_ref.diffusion.scheduler_levels import SchedulerLevels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
SCHEDULE = NoiseSchedule()
TABLE = 2e-5  # relative: diffusers' table is float32 throughout, up to 1.3e-5 off at t = 0
# In 48, 96 and 112 steps "trailing" meets halves, which diffusers' floating-point range rounds up or down.
COUNTS = (2, 3, 4, 5, 7, 8, 10, 12, 15, 20, 25, 28, 30, 40, 48, 50, 64, 96, 100, 112, 250, 333)


def euler(spacing: str, **options: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing=spacing, **options)


def test_sigmas_are_the_formula() -> None:
    product, sigmas = 1.0, []
    for t in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999
        product *= 1 - root * root
        sigmas.append(math.sqrt((1 - product) / product))
    assert SCHEDULE.table.tolist() == pytest.approx(sigmas, rel=1e-12)
    assert SCHEDULE.sigmas.dtype == torch.float32
    assert SCHEDULE.sigmas.tolist() == pytest.approx(sigmas, rel=6e-8)  # half a unit in the last place


def test_sigmas_are_those_of_diffusers() -> None:
    alphas_cumprod = euler("leading").alphas_cumprod.double()
    torch.testing.assert_close(
        SCHEDULE.sigmas.double(), ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, rtol=TABLE, atol=0
    )


def test_known_levels() -> None:
    at = {999: 14.6146, 0: 0.0292, 199: 0.56928, 200: 0.57167}
    for t, sigma in at.items():
        assert float(SCHEDULE.sigmas[t]) == pytest.approx(sigma, abs=5e-5 if t in (0, 999) else 5e-6)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers(spacing: str, karras: bool, steps: int) -> None:
    peer = euler(spacing, use_karras_sigmas=karras)
    peer.set_timesteps(steps)
    grid = SCHEDULE.grid(steps, spacing, karras)
    assert grid.sigmas.shape == peer.sigmas.shape == (steps + 1,)
    torch.testing.assert_close(grid.sigmas, peer.sigmas, rtol=TABLE, atol=0)
    timesteps = torch.tensor(grid.timesteps)
    if karras:  # through the inverse, which magnifies the table's error: at sigma_max one step is 0.6 %
        torch.testing.assert_close(timesteps, peer.timesteps, rtol=0, atol=2e-3)
    else:
        assert torch.equal(timesteps, peer.timesteps)
    assert SCHEDULE.initial_scale(grid.sigmas, spacing) == pytest.approx(float(peer.init_noise_sigma), rel=TABLE)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing: str) -> None:
    """But where diffusers' floating-point range runs one over: 61 steps of "trailing" give it 62, down to t = -1."""
    peer, compared, differing = euler(spacing), 0, []
    for steps in range(1, 1000):
        peer.set_timesteps(steps)
        if len(peer.timesteps) == steps:
            compared += 1
            if not torch.equal(torch.tensor(SCHEDULE.grid(steps, spacing).timesteps), peer.timesteps):
                differing.append(steps)
    assert differing == []
    assert compared >= 900


def official_sigmas(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The official discretisation: `steps` of the 1000 levels, from the last down, the first one (t = 0) left out."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).numpy() ** 2
    abar = np.cumprod(1.0 - betas, axis=0)
    if steps < 1000:
        ascending = np.linspace(999, 0, steps, endpoint=False).astype(int)[::-1]
    else:
        ascending = np.arange(1000)
    return ascending[::-1], (((1 - abar[ascending]) / abar[ascending]) ** 0.5)[::-1]


def test_sgm_is_the_official_rule_for_every_number_of_steps() -> None:
    for steps in range(1, 1001):
        timesteps, sigmas = official_sigmas(steps)
        grid = SCHEDULE.grid(steps, "sgm")
        assert grid.timesteps == tuple(timesteps.tolist()), steps
        np.testing.assert_allclose(grid.sigmas[:-1].numpy(), sigmas, rtol=1e-7, err_msg=str(steps))


@pytest.mark.parametrize(
    ("spacing", "steps", "first", "last"),
    [
        ("leading", 50, 981, 1),
        ("trailing", 50, 999, 19),
        ("linspace", 50, 999, 0),
        ("sgm", 50, 999, 19),
        ("leading", 40, 976, 1),
        ("sgm", 1000, 999, 0),
        ("trailing", 1000, 999, 0),
    ],
)
def test_known_ends(spacing: str, steps: int, first: int, last: int) -> None:
    timesteps = SCHEDULE.grid(steps, spacing).timesteps
    assert (timesteps[0], timesteps[-1]) == (first, last)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_grid_descends_to_zero_within_the_table(spacing: str, karras: bool) -> None:
    for steps in range(1, 1000, 1 if not karras else 37):
        grid = SCHEDULE.grid(steps, spacing, karras)
        sigmas = grid.sigmas
        assert sigmas.dtype == torch.float32
        assert len(grid.timesteps) == steps == len(sigmas) - 1
        assert (sigmas.diff() < 0).all(), steps
        assert sigmas[-1] == 0
        assert SCHEDULE.table[0] * (1 - 1e-6) <= sigmas[-2] <= sigmas[0] <= SCHEDULE.table[-1] * (1 + 1e-6)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_discretize_gives_the_levels_of_the_grid(spacing: str, karras: bool) -> None:
    assert torch.equal(SCHEDULE.discretize(25, spacing, karras), SCHEDULE.grid(25, spacing, karras).sigmas)
    assert torch.equal(SCHEDULE.discretize(25), SCHEDULE.grid(25, "leading", False).sigmas)  # the defaults


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_karras_sigmas_are_the_papers(spacing: str, steps: int) -> None:
    """Karras et al. 2022, equation 5 with rho 7, between the ends of the spacing."""
    plain = SCHEDULE.grid(steps, spacing).sigmas.tolist()[:-1]
    high, low = plain[0] ** (1 / 7), plain[-1] ** (1 / 7)
    expected = [(high + i / max(1, steps - 1) * (low - high)) ** 7 for i in range(steps)]
    assert SCHEDULE.grid(steps, spacing, True).sigmas.tolist() == pytest.approx([*expected, 0.0], rel=5e-7)


@pytest.mark.parametrize("steps", [7, 20, 999])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_level_on_the_grid_keeps_its_exact_timestep(spacing: str, steps: int) -> None:
    grid = SCHEDULE.grid(steps, spacing)
    cut = grid.cut(2, steps - 1)
    expected = SCHEDULE.timesteps(steps, spacing).tolist()
    assert [grid.timestep(sigma) for sigma in grid.sigmas[:-1].tolist()] == expected
    assert [cut.timestep(sigma) for sigma in cut.sigmas[:-1].tolist()] == expected[2 : steps - 1]
    assert torch.equal(cut.sigmas, grid.sigmas[2:steps])


def between(low: int, share: float) -> float:
    """A level between the training steps `low` and `low + 1`, by its logarithm."""
    return math.exp((1 - share) * math.log(SCHEDULE.table[low]) + share * math.log(SCHEDULE.table[low + 1]))


@pytest.mark.parametrize(("low", "share"), [(0, 0.25), (199, 0.5), (500, 0.9), (998, 0.1)])
def test_off_the_grid_the_timestep_is_linear_in_log_sigma(low: int, share: float) -> None:
    sigma = between(low, share)
    for spacing in ("leading", "trailing", "linspace"):
        assert SCHEDULE.grid(3, spacing).timestep(sigma) == pytest.approx(low + share, abs=1e-9)
    peer = euler("leading")
    log_sigmas = np.log(peer.sigmas.flip(0)[1:].double().numpy())
    assert peer._sigma_to_t(np.float64(sigma), log_sigmas) == pytest.approx(low + share, abs=2e-3)


def test_off_the_official_grid_the_timestep_is_the_nearest_levels() -> None:
    grid = SCHEDULE.grid(10, "sgm")
    for low in (0, 199, 500, 998):
        a, b = SCHEDULE.table[low : low + 2]
        assert grid.timestep(float(a + 0.49 * (b - a))) == low
        assert grid.timestep(float(a + 0.51 * (b - a))) == low + 1
    assert all(t == int(t) for t in SCHEDULE.grid(10, "sgm", True).timesteps)


@pytest.mark.parametrize("inverse", [SCHEDULE.timestep, SCHEDULE.nearest_timestep])
def test_both_inverses_hit_the_table_and_stop_at_its_ends(inverse: Callable[[float], float]) -> None:
    assert [inverse(float(sigma)) for sigma in SCHEDULE.table] == pytest.approx(list(range(1000)), abs=1e-9)
    assert (inverse(1e-3), inverse(100.0)) == (0, 999)


@pytest.mark.parametrize(
    ("spacing", "karras", "base", "refiner"),
    [
        ("leading", True, 12, 8),
        ("linspace", True, 12, 8),
        ("trailing", True, 16, 4),
        ("leading", False, 16, 4),
        ("trailing", False, 16, 4),
        ("linspace", False, 16, 4),
        ("sgm", False, 16, 4),
    ],
)
def test_the_hand_off_at_four_fifths(spacing: str, karras: bool, base: int, refiner: int) -> None:
    grid = SCHEDULE.grid(20, spacing, karras)
    assert grid.steps_above(SCHEDULE.switch_sigma(0.8)) == base
    assert len(grid.timesteps) - base == refiner
    assert grid.timesteps[base - 1] >= 200 > grid.timesteps[base]


def test_the_hand_off_at_the_ends_and_on_a_level() -> None:
    assert SCHEDULE.switch_sigma(0.8) == float(SCHEDULE.sigmas[200])
    grid = SCHEDULE.grid(1000, "sgm")  # every training step
    shares = [k / 1000 for k in range(1001)]
    assert [grid.steps_above(SCHEDULE.switch_sigma(share)) for share in shares] == list(range(1001))
    assert grid.steps_above(0.57) == 800  # t = 200, at 0.57167, is the last of the first network's
    assert grid.steps_above(float(grid.sigmas[800]) * (1 + 1e-6)) == 800


@pytest.mark.parametrize("share", [-0.1, 1.001, math.nan, math.inf])
def test_a_switch_outside_the_schedule(share: float) -> None:
    with pytest.raises(InputError, match=f"share of the training steps must be from 0 to 1, found {share}"):
        SCHEDULE.switch_sigma(share)


@pytest.mark.parametrize(
    ("spacing", "steps", "scale"),
    [("leading", 50, 13.16), ("sgm", 50, 14.6488), ("trailing", 50, 14.6146), ("linspace", 50, 14.6146)],
)
def test_initial_scale(spacing: str, steps: int, scale: float) -> None:
    assert SCHEDULE.initial_scale(SCHEDULE.discretize(steps, spacing), spacing) == pytest.approx(
        scale, abs=5e-3 if spacing == "leading" else 5e-5
    )


SCHEDULERS = {  # of the samplers here
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_first_noise_is_diffusers_with_every_sampler(sampler: str, spacing: str) -> None:
    """`init_noise_sigma` times noise; x / sqrt(1 + sigma^2) is what a scheduler that starts from unit noise steps."""
    is_unit = sampler in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
    peer = SCHEDULERS[sampler].from_config(euler(spacing).config, timestep_spacing=spacing)
    peer.set_timesteps(20)
    sigmas = SCHEDULE.discretize(20, spacing)
    expected = float(peer.init_noise_sigma) * (math.sqrt(1 + float(sigmas[0]) ** 2) if is_unit else 1.0)
    assert SCHEDULE.initial_scale(sigmas, spacing, sampler) == pytest.approx(expected, rel=TABLE)
    asked_for = SchedulerLevels("EulerDiscreteScheduler", "euler", spacing, 1, "exponential")  # as a folder may
    levels = asked_for.grid(20).sigmas
    assert SCHEDULE.initial_scale(levels, asked_for, sampler) == pytest.approx(expected, rel=TABLE)


ALL = {(spacing, karras) for spacing in ("leading", "trailing", "linspace") for karras in (False, True)}
PLAIN = {(spacing, False) for spacing in ("leading", "trailing", "linspace")}
GRIDS = {  # of each scheduler: all that it has, and those that are Euler's
    "euler_ancestral": (PLAIN, PLAIN),
    "heun": (ALL, ALL),
    "lms": (ALL, ALL),
    "ddim": (PLAIN, PLAIN - {("linspace", False)}),
    "ddpm": (PLAIN, PLAIN - {("linspace", False)}),
    "dpmpp_2m": (ALL, {("trailing", False)}),
    "dpmpp_2m_sde": (ALL, {("trailing", False)}),
    "unipc": (ALL, {("trailing", False)}),
}


@pytest.mark.parametrize("sampler", GRIDS)
def test_which_grids_are_diffusers_with_every_sampler(sampler: str) -> None:
    """As README says it: those of Euler's relatives all, of DDIM and DDPM two, of the multistep solvers one."""
    available, expected = GRIDS[sampler]
    same = set()
    for spacing, karras in sorted(available):
        options = {"use_karras_sigmas": True} if karras else {}
        peer = SCHEDULERS[sampler].from_config(euler(spacing).config, timestep_spacing=spacing, **options)
        peer.set_timesteps(20)
        theirs = list(dict.fromkeys(peer.timesteps.tolist()))  # Heun's stand twice
        ours = SCHEDULE.grid(20, spacing, karras).timesteps
        assert len(theirs) == len(ours)
        if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 2e-3:  # as of Karras' above
            same.add((spacing, karras))
    assert same == expected


def strength_steps_sgm(steps: int, strength: float) -> int:
    return strength_steps(steps, strength, "sgm")


RULES = [(strength_steps, lambda n, k: n * k // 100), (strength_steps_sgm, lambda n, k: (n + 1) * k // 100 - 1)]


@pytest.mark.parametrize(("rule", "exact"), RULES)
def test_strength_is_exact(rule: Callable[[int, float], int], exact: Callable[[int, int], int]) -> None:
    for steps in range(1, 101):
        for k in range(1, 101):
            expected = exact(steps, k)
            if expected >= 1:
                assert rule(steps, k / 100) == expected, (steps, k)
            else:
                with pytest.raises(InputError, match="runs 0 steps"):
                    rule(steps, k / 100)


def test_strength_where_floating_point_fails() -> None:
    assert int(50 * 0.58) == 28  # the trap
    assert strength_steps(50, 0.58) == 29
    assert strength_steps(1000, 0.001) == 1
    assert (strength_steps(10, 0.4), strength_steps_sgm(10, 0.4)) == (4, 3)


@pytest.mark.parametrize(("rule", "exact"), RULES)
def test_too_little_strength_names_the_smallest_that_runs(rule: Callable[[int, float], int], exact: Any) -> None:
    for steps in range(1, 201):
        with pytest.raises(InputError, match=r"strength 0\.0001 .*runs 0 steps") as caught:
            rule(steps, 0.0001)
        smallest = re.search(r"smallest strength is (\S+)$", str(caught.value))
        assert smallest is not None
        assert rule(steps, float(smallest[1])) == 1, steps
        below = Fraction(smallest[1]) - Fraction(1, 10_000)  # it is the smallest of four decimals
        with pytest.raises(InputError, match="runs 0 steps"):
            rule(steps, float(below))


@pytest.mark.parametrize("strength", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [strength_steps, strength_steps_sgm])
def test_strength_outside_its_range(rule: Callable[[int, float], int], strength: float) -> None:
    with pytest.raises(InputError, match=f"strength must be above 0 and at most 1, found {strength}"):
        rule(50, strength)


@pytest.mark.parametrize("strength", [1, 1.0])
def test_full_strength_runs_every_step(strength: float) -> None:
    assert strength_steps(37, strength) == strength_steps_sgm(37, strength) == 37


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, 50.0, "50", None])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_bad_numbers_of_steps(spacing: str, steps: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"whole number from 1 to 1000, found {steps!r}")):
        SCHEDULE.discretize(steps, spacing)


@pytest.mark.parametrize("spacing", ["", "Leading", "exponential", None])
def test_an_unknown_spacing(spacing: Any) -> None:
    with pytest.raises(InputError, match="expected one of leading, trailing, linspace, sgm") as caught:
        SCHEDULE.discretize(50, spacing)
    assert repr(spacing) in str(caught.value)


def test_leading_with_1000_steps_is_refused() -> None:
    with pytest.raises(InputError, match='"leading" with 1000 steps leaves the 1000 training steps: use "trailing"'):
        SCHEDULE.discretize(1000)
