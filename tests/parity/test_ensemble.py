"""The hand-off between two experts, for every sampler, spacing, schedule, step count and switch.

The algorithms are written out here once more, from their papers, with the two networks in place: the log of
(sigma, network) of every evaluation and the results have to agree.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pairs
import peers
import pytest
import torch
from pairs import seeded
from torch import Tensor

from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import SPACINGS, NoiseSchedule
from sdxl_ref.pipelines import EnsemblePipeline
from sdxl_ref.pipelines.ensemble import EnsembleRequest, Experts

Log = list[tuple[float, str]]
STEPS = [  # numbers of steps that one test runs
    pytest.param((5, 20), id="some"),
    pytest.param((8, 13, 37, 50), id="others", marks=pytest.mark.sweep),
]
SWITCHES = [{"switch": 0.8}, {"switch_sigma": 2.5}, {"switch_step": 3}]


def experts(log: Log) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Two different denoisers that write down who evaluated what."""

    def base(x: Tensor, sigma: Any) -> Tensor:
        log.append((float(sigma), "base"))
        return torch.tanh(x / (1 + float(sigma))) * 0.9

    def refiner(x: Tensor, sigma: Any) -> Tensor:
        log.append((float(sigma), "refiner"))
        return torch.sin(x) * 0.7 - 0.1

    return base, refiner


def euler(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Karras et al. 2022, equation 3 with sigma(t) = t, one Euler step a level."""
    for a, b in itertools.pairwise(s):
        x = x + (b - a) * (x - d(x, a)) / a
    return x


def ancestral(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Ho et al. 2020, algorithm 2, in x = x_t / sqrt(abar): posterior mean and variance between two levels."""
    for a, b in itertools.pairwise(s):
        x0 = d(x, a)
        mean = (b * b / (a * a)) * x + (1 - b * b / (a * a)) * x0
        x = mean + math.sqrt(b * b * (a * a - b * b) / (a * a)) * noise() if b else mean
    return x


def heun(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Karras et al. 2022, algorithm 1 with S_churn = 0."""
    for a, b in itertools.pairwise(s):
        slope = (x - d(x, a)) / a
        guess = x + (b - a) * slope
        x = x + (b - a) * (slope / 2 + (guess - d(guess, b)) / b / 2) if b else guess
    return x


def dpmpp_2m(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Lu et al. 2022, algorithm 2, with alpha = 1 and lambda = -log sigma."""
    older: tuple[Tensor, float] | None = None
    for a, b in itertools.pairwise(s):
        x0 = d(x, a)
        if b == 0:
            return x0
        h = math.log(a / b)
        combined = x0 if older is None else x0 + (x0 - older[0]) * h / (2 * older[1])
        x = b / a * x + (1 - math.exp(-h)) * combined
        older = x0, h
    return x


def dpmpp_2s(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Lu et al. 2022, algorithm 1 with r_1 = 1/2, to the lower level of the ancestral step; then its noise."""
    for a, b in itertools.pairwise(s):
        x0 = d(x, a)
        if b == 0:
            return x0
        down = b * b / a
        middle = b  # sqrt(a * down), halfway in log sigma
        u = middle / a * x + (1 - middle / a) * x0
        x = down / a * x + (1 - down / a) * d(u, middle) + math.sqrt(b * b - down * down) * noise()
    return x


def lms(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Adams-Bashforth on uneven levels: the polynomial through up to 4 slopes, integrated by Gauss-Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    slopes: list[tuple[float, Tensor]] = []
    for a, b in itertools.pairwise(s):
        slopes = [(a, (x - d(x, a)) / a), *slopes][:4]
        at = (a + b) / 2 + (b - a) / 2 * nodes
        for i, (level, slope) in enumerate(slopes):
            basis = np.ones_like(at)
            for j, (other, _) in enumerate(slopes):
                if j != i:
                    basis = basis * (at - other) / (level - other)
            x = x + float((basis * weights).sum() * (b - a) / 2) * slope
    return x


def dpmpp_2m_sde(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Lu et al. 2022, SDE-DPM-Solver++(2M) of appendix A, with alpha = 1; e^(-2h) is the squared ratio of levels."""
    older: tuple[Tensor, float] | None = None
    for a, b in itertools.pairwise(s):
        x0 = d(x, a)
        if b == 0:
            return x0
        h = math.log(a / b)
        share = (b / a) ** 2
        combined = x0 if older is None else x0 + (x0 - older[0]) * h / (2 * older[1])
        x = share * x + (1 - share) * combined + b * math.sqrt(1 - share) * noise()
        older = x0, h
    return x


def dpmpp_3m_sde(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """k-diffusion's `sample_dpmpp_3m_sde` with eta = 1, in its own names."""
    older: list[tuple[Tensor, float]] = []
    for a, b in itertools.pairwise(s):
        x0 = d(x, a)
        if b == 0:
            return x0
        h = math.log(a / b)
        h_eta = 2 * h
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * x0
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if len(older) == 1:
            [(x1, h_1)] = older
            x = x + phi_2 * (x0 - x1) * h / h_1
        elif len(older) == 2:
            (x1, h_1), (x2, h_2) = older
            r0 = h_1 / h
            r1 = h_2 / h
            d1_0 = (x0 - x1) / r0
            d1_1 = (x1 - x2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            phi_3 = phi_2 / h_eta - 0.5
            x = x + phi_2 * d1 - phi_3 * d2
        x = x + b * math.sqrt(-math.expm1(-2 * h)) * noise()
        older = [(x0, h), *older][:2]
    return x


def unified(x: Tensor, a: float, b: float, x0: Tensor, others: list[tuple[float, Tensor]]) -> Tensor:
    """Zhao et al. 2023, theorem 3.1 and appendix A, for data prediction with B(h) = e^h - 1; up to two more points."""
    h = math.log(a / b)
    rise = -math.expm1(-h)
    b_1 = (rise / h - 1) / -rise
    b_2 = 2 * ((rise / h - 1) / -h - 0.5) / -rise
    if len(others) == 2:
        [r, one] = [r for r, _ in others]
        rho = [(b_1 - b_2) / (one - r), (b_2 - r * b_1) / (one - r)]
    else:
        rho = [0.5] * len(others)
    x = b / a * x + rise * x0
    for weight, (r, other) in zip(rho, others, strict=True):
        x = x + rise * weight * (other - x0) / r
    return x


def unipc(d: Any, x: Tensor, s: list[float], noise: Any) -> Tensor:
    """Zhao et al. 2023, UniPC-2, multistep: predict from two estimates, correct with the one at the step's end."""
    start: tuple[Tensor, float, Tensor, list[tuple[float, Tensor]]] | None = None
    older: tuple[float, Tensor] | None = None
    for i, (a, b) in enumerate(itertools.pairwise(s)):
        x0 = d(x, a)
        if b == 0:
            return x0
        if start is not None:
            before, level, estimate, others = start
            x = unified(before, level, a, estimate, [*others, (1.0, x0)])
        others = []
        if older is not None and i < len(s) - 2:  # first order in the last step but one, and in the first one
            others = [(-math.log(older[0] / a) / math.log(a / b), older[1])]
        start = x, a, x0, others
        x = unified(x, a, b, x0, others)
        older = a, x0
    return x


PAPER = {
    "euler": euler,
    "ddim": euler,
    "euler_ancestral": ancestral,
    "ddpm": ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_2s_ancestral": dpmpp_2s,
    "lms": lms,
    "unipc": unipc,
}


def owner(sigma: float, sigmas: list[float], switch: dict[str, Any]) -> str:
    """Who evaluates at a level, from the meaning of each unit."""
    if "switch_sigma" in switch:
        return "base" if sigma >= switch["switch_sigma"] else "refiner"
    if "switch_step" in switch:
        return "base" if sigma > sigmas[switch["switch_step"]] else "refiner"
    return "base" if sigma >= float(NoiseSchedule().sigmas[round(1000 * (1 - switch["switch"]))]) else "refiner"


SUMS = 1e-6  # relative: float64, but for levels that the samplers keep in float32


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", PAPER)  # one whose formula does not stand here has the test of one network below
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("karras", [False, True], ids=["plain", "karras"])
def test_hand_off_equals_the_papers_with_two_networks(
    sampler: str, spacing: str, karras: bool, steps: tuple[int, ...]
) -> None:
    for count, switch in itertools.product(steps, SWITCHES):
        check_hand_off(sampler, {"spacing": spacing, "karras": karras, "num_inference_steps": count}, switch)


def check_hand_off(sampler: str, schedule: dict[str, Any], switch: dict[str, Any]) -> None:
    plan = EnsemblePipeline.plan_for(EnsembleRequest(prompt="", sampler=sampler, **schedule, **switch))
    sigmas = plan.grid.sigmas.tolist()
    x = sigmas[0] * torch.randn(2, 4, 4, 4, generator=seeded(0), dtype=torch.float64)

    log: Log = []
    combined = Experts(*experts(log), plan.switch)  # type: ignore[arg-type]
    *_, last = SAMPLERS[sampler](combined, x, plan.grid.sigmas, generator=seeded(1))

    expected: Log = []
    base, refiner = experts(expected)

    def piecewise(x: Tensor, sigma: float) -> Tensor:
        network = base if owner(sigma, sigmas, switch) == "base" else refiner
        return network(x, sigma)

    draws = seeded(1)
    theirs = PAPER[sampler](piecewise, x, sigmas, lambda: torch.randn(x.shape, generator=draws).double())

    assert [who for _, who in log] == [who for _, who in expected]
    assert np.allclose([sigma for sigma, _ in log], [sigma for sigma, _ in expected], rtol=SUMS)
    assert float((last.x - theirs).abs().max()) <= SUMS * max(1.0, float(theirs.abs().max()))
    assert plan.evaluations == tuple(sum(who == name for _, who in log) for name in ("base", "refiner"))
    assert all(plan.evaluations)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_network_on_both_sides_is_the_single_run(sampler: str) -> None:
    log: Log = []
    base, _ = experts(log)
    sigmas = NoiseSchedule().discretize(20)
    x = sigmas[0] * torch.randn(1, 4, 4, 4, generator=seeded(0))
    both = Experts(base, base, 2.5)  # type: ignore[arg-type]
    for one, two in zip(
        SAMPLERS[sampler](base, x, sigmas, generator=seeded(1)),
        SAMPLERS[sampler](both, x, sigmas, generator=seeded(1)),
        strict=True,
    ):
        assert torch.equal(one.x, two.x)


def test_the_plan_of_karras_sigmas_at_20_steps() -> None:
    """0.8 is a share of the training steps: it does not split 20 Karras steps into 16 and 4, and the plan says so."""
    splits = {}
    for spacing in ("leading", "linspace", "trailing"):
        request = EnsembleRequest(prompt="", karras=True, spacing=spacing, num_inference_steps=20, switch=0.8)
        splits[spacing] = EnsemblePipeline.plan_for(request).evaluations
    assert splits == {"leading": (12, 8), "linspace": (12, 8), "trailing": (16, 4)}


DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2s_ancestral": ("KDPM2DiscreteScheduler", {}),  # the solver there that steps by way of a midpoint
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}  # and none for dpmpp_3m_sde: a third-order SDE there has another sign in its last term
EQUAL = 1e-6  # relative: the two calls are the single run
DIFFERENT = 1e-3  # a hand-off that evaluates the wrong network, or forgets its noise or most of its history
RESTARTED = 1e-4  # one that begins anew with a step of first order: "dpmpp_2m", "unipc"


def gap_of_diffusers(sampler: str, kind: str, arguments: dict[str, Any], latents: Tensor) -> float:
    """The model card's two calls against the single run, the base's network in both: relative distance."""
    name, options = DIFFUSERS[sampler]

    def first() -> Any:
        return pairs.diffusers_base(name, kind=kind, **options)

    single = first()(**arguments, latents=latents.clone(), generator=seeded(7)).images
    draws = seeded(7)
    handed = first()(**arguments, latents=latents.clone(), generator=draws, denoising_end=0.8).images
    finish = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    second = pairs.diffusers_base_img2img(name, kind, **options)
    return peers.distance(second(**finish, image=handed, generator=draws, denoising_start=0.8).images, single)


def gap_of_ours(sampler: str, kind: str, arguments: dict[str, Any], latents: Tensor) -> float:
    """The ensemble against the single run, the same network on both sides."""
    base = pairs.base(kind)
    ensemble = EnsemblePipeline(base, pairs.refiner())
    ensemble.refiner = base  # type: ignore[assignment]
    arguments = arguments | {"latents": latents, "sampler": sampler}
    together = ensemble(**arguments, generator=seeded(7), switch=0.8).images
    return peers.distance(together, base(**arguments, generator=seeded(7)).images)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of diffusers' LMS
@pytest.mark.parametrize(
    ("kind", "size", "samplers"),
    [
        pytest.param("base", (32, 32), ("euler", "heun", "lms", "unipc"), id="some"),
        pytest.param("small base", (64, 96), tuple(DIFFUSERS), id="all", marks=pytest.mark.sweep),
    ],
)
def test_single_run_and_ensemble_side_by_side_with_diffusers(
    kind: str, size: tuple[int, int], samplers: tuple[str, ...]
) -> None:
    """The same weights, noise, prompt and levels: what the hand-off alone changes. README shows the small base's."""
    height, width = size
    arguments = {"prompt": "a cup of coffee", "negative_prompt": "blurry", "num_inference_steps": 10}
    arguments |= {"height": height, "width": width, "output_type": "latent"}
    latents = torch.randn(1, 4, height // 8, width // 8, generator=seeded(3))
    print("\n| sampler | diffusers' scheduler | its two calls | our ensemble |\n| --- | --- | --- | --- |")
    gaps = {}
    for sampler in samplers:
        scheduler, _ = DIFFUSERS[sampler]
        theirs = gap_of_diffusers(sampler, kind, arguments, latents)
        ours = gap_of_ours(sampler, kind, arguments, latents)
        print(f"| {sampler} | {scheduler} | {theirs:.1e} | {ours:.1e} |")
        gaps[sampler] = theirs, ours
    assert all(ours == 0 for _, ours in gaps.values())
    assert gaps["euler"][0] < EQUAL  # one evaluation a step, no history: the two calls are right
    least = dict.fromkeys(DIFFUSERS, DIFFERENT) | {"euler": -1.0, "dpmpp_2m": RESTARTED, "unipc": RESTARTED}
    assert [sampler for sampler, (theirs, _) in gaps.items() if theirs <= least[sampler]] == []
