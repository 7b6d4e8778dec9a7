"""The hand-off between two experts, for every sampler, spacing, schedule, step count and switch.

The algorithms are written out here once more, from their papers, with the two networks in place: the log of
(sigma, network) of every evaluation and the results have to agree.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import checks
import numpy as np
import peers
import pytest
import torch
from torch import Tensor

from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import SPACINGS, NoiseSchedule
from sdxl_ref.ecosystem import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.pipelines.ensemble import EnsembleRequest, Experts

Log = list[tuple[float, str]]
STEPS = [5, 8, 13, 20, 37, 50]
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


PAPER = {
    "euler": euler,
    "ddim": euler,
    "euler_ancestral": ancestral,
    "ddpm": ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s_ancestral": dpmpp_2s,
    "lms": lms,
}


def owner(sigma: float, sigmas: list[float], switch: dict[str, Any]) -> str:
    """Who evaluates at a level, from the meaning of each unit."""
    if "switch_sigma" in switch:
        return "base" if sigma >= switch["switch_sigma"] else "refiner"
    if "switch_step" in switch:
        return "base" if sigma > sigmas[switch["switch_step"]] else "refiner"
    return "base" if sigma >= float(NoiseSchedule().sigmas[round(1000 * (1 - switch["switch"]))]) else "refiner"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("karras", [False, True], ids=["plain", "karras"])
def test_hand_off_equals_the_papers_with_two_networks(sampler: str, spacing: str, karras: bool) -> None:
    for steps, switch in itertools.product(STEPS, SWITCHES):
        request = EnsembleRequest(
            prompt="", sampler=sampler, spacing=spacing, karras=karras, num_inference_steps=steps, **switch
        )
        plan = EnsemblePipeline.plan(request)
        sigmas = plan.grid.sigmas.tolist()
        x = sigmas[0] * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        log: Log = []
        combined = Experts(*experts(log), plan.switch)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        *_, last = SAMPLERS[sampler](combined, x, plan.grid.sigmas, generator=generator)

        expected: Log = []
        base, refiner = experts(expected)

        def piecewise(x: Tensor, sigma: float) -> Tensor:
            network = base if owner(sigma, sigmas, switch) == "base" else refiner  # noqa: B023
            return network(x, sigma)

        draws = torch.Generator().manual_seed(1)
        theirs = PAPER[sampler](piecewise, x, sigmas, lambda: torch.randn(x.shape, generator=draws).double())  # noqa: B023

        assert [who for _, who in log] == [who for _, who in expected]
        assert np.allclose([s for s, _ in log], [s for s, _ in expected], rtol=1e-6)
        assert float((last.x - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))
        assert plan.evaluations == tuple(sum(who == name for _, who in log) for name in ("base", "refiner"))
        assert all(plan.evaluations)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_network_on_both_sides_is_the_single_run(sampler: str) -> None:
    log: Log = []
    base, _ = experts(log)
    sigmas = NoiseSchedule().discretize(20)
    x = sigmas[0] * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    both = Experts(base, base, 2.5)  # type: ignore[arg-type]
    for one, two in zip(
        SAMPLERS[sampler](base, x, sigmas, generator=torch.Generator().manual_seed(1)),
        SAMPLERS[sampler](both, x, sigmas, generator=torch.Generator().manual_seed(1)),
        strict=True,
    ):
        assert torch.equal(one.x, two.x)


def test_the_plan_of_karras_sigmas_at_20_steps() -> None:
    """0.8 is a share of the training steps: it does not split 20 Karras steps into 16 and 4, and the plan says so."""
    splits = {}
    for spacing in ("leading", "linspace", "trailing"):
        request = EnsembleRequest(prompt="", karras=True, spacing=spacing, num_inference_steps=20, switch=0.8)
        splits[spacing] = EnsemblePipeline.plan(request).evaluations
    assert splits == {"leading": (12, 8), "linspace": (12, 8), "trailing": (16, 4)}


DIFFUSERS = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2s_ancestral": "KDPM2DiscreteScheduler",  # the solver there that steps by way of a midpoint
    "lms": "LMSDiscreteScheduler",
}


def gap_of_diffusers(scheduler: str, arguments: dict[str, Any], latents: Tensor) -> float:
    """The model card's two calls against the single run, the base's network in both: relative distance."""
    first = checks.diffusers_text2img(scheduler)
    single = first(**arguments, latents=latents.clone()).images
    second = checks.diffusers_base_img2img(scheduler)
    handed = checks.diffusers_text2img(scheduler)(**arguments, latents=latents.clone(), denoising_end=0.8).images
    finish = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    return peers.distance(second(**finish, image=handed, denoising_start=0.8).images, single)


def gap_of_ours(sampler: str, arguments: dict[str, Any], latents: Tensor) -> float:
    """The ensemble against the single run, the same network on both sides."""
    base = TextToImagePipeline(peers.SMALL_BASE, **checks.small_base_parts())  # type: ignore[arg-type]
    ensemble = EnsemblePipeline(base, ImageToImagePipeline(peers.SMALL_REFINER, **checks.small_pipeline_parts()))  # type: ignore[arg-type]
    ensemble.refiner = base  # type: ignore[assignment]
    arguments = arguments | {"latents": latents, "sampler": sampler}
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    together = ensemble(**arguments, generator=seeds[0], switch=0.8).images
    return peers.distance(together, base(**arguments, generator=seeds[1]).images)


def test_single_run_and_ensemble_side_by_side_with_diffusers() -> None:
    """The same small weights, noise, prompt and levels: what the hand-off alone changes. README shows the table."""
    arguments = {"prompt": "a cup of coffee", "negative_prompt": "blurry", "num_inference_steps": 10}
    arguments |= {"height": 64, "width": 96, "output_type": "latent"}
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    print("\n| sampler | diffusers' scheduler | its two calls | our ensemble |\n| --- | --- | --- | --- |")
    gaps = {}
    for sampler, scheduler in DIFFUSERS.items():
        gaps[sampler] = gap_of_diffusers(scheduler, arguments, latents), gap_of_ours(sampler, arguments, latents)
        print("| {} | {} | {:.1e} | {:.1e} |".format(sampler, scheduler, *gaps[sampler]))
    assert all(ours == 0 for _, ours in gaps.values())
    assert gaps["euler"][0] < 1e-6  # one evaluation a step, no history: the two calls are right
    assert all(gaps[sampler][0] > 1e-3 for sampler in ("heun", "dpmpp_2s_ancestral", "lms"))
