"""`pipe.wrap_denoiser`: the one place where a user changes what happens at an evaluation."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import checks
import pairs
import pytest
import torch
from pairs import seeded
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Conditioning
from sdxl_ref.diffusion.guidance import Guidance
from sdxl_ref.diffusion.steps import Denoise
from sdxl_ref.pipelines.ensemble import Experts
from sdxl_ref.pipelines.first_noise import first_noise

PIPES = {"base": pairs.base, "refiner": pairs.refiner, "ensemble": pairs.ensemble}
STEPS = 6
LOW, HIGH = 1.0, 5.0  # the levels between which there is guidance
SCALE = 7.0


def paint(pipe: Any, kind: str, **changes: Any) -> Tensor:
    usual: dict[str, Any] = {"prompt": "a cup", "num_inference_steps": STEPS, "output_type": "latent"}
    if kind == "refiner":
        usual |= {"image": torch.zeros(1, 4, 8, 8), "strength": 1.0}
    else:
        usual |= {"height": 64, "width": 64}
    images: Tensor = pipe(**usual | {"generator": seeded(0)} | changes).images
    return images


@pytest.mark.parametrize("kind", PIPES)
def test_the_identity_changes_nothing_and_none_takes_it_off(kind: str) -> None:
    pipe = PIPES[kind]()
    plain = paint(pipe, kind)
    wrapped = []

    def identity(denoise: Denoise) -> Denoise:
        wrapped.append(denoise)
        return denoise

    pipe.wrap_denoiser = identity
    assert torch.equal(paint(pipe, kind), plain)
    assert torch.equal(paint(pipe, kind), plain)
    assert len(wrapped) == 2  # once a run
    pipe.wrap_denoiser = None
    assert torch.equal(paint(pipe, kind), plain)
    assert len(wrapped) == 2


def recorded(levels: list[float]) -> Callable[[Denoise], Denoise]:
    """A wrapper that writes the level of every evaluation down."""

    def wrap(denoise: Denoise) -> Denoise:
        def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
            levels.append(float(sigma))
            return denoise(x, sigma)

        return evaluate

    return wrap


@pytest.mark.parametrize(("sampler", "count"), [("euler", STEPS), ("heun", 2 * STEPS - 1), ("dpmpp_2m", STEPS)])
@pytest.mark.parametrize("kind", PIPES)
def test_it_sees_every_evaluation(kind: str, sampler: str, count: int) -> None:
    pipe = PIPES[kind]()
    levels: list[float] = []
    pipe.wrap_denoiser = recorded(levels)
    paint(pipe, kind, sampler=sampler)
    assert len(levels) == count
    assert levels == sorted(levels, reverse=True)


def test_of_an_ensemble_it_sees_the_two_experts_as_one() -> None:
    pipe = pairs.ensemble()
    levels: list[float] = []
    seen: list[Any] = []

    def wrap(denoise: Denoise) -> Denoise:
        seen.append(denoise)
        return recorded(levels)(denoise)

    pipe.wrap_denoiser = wrap
    paint(pipe, "ensemble", sampler="heun")
    [experts] = seen
    assert isinstance(experts, Experts)
    plan = pipe.plan(pipe.request(prompt="", num_inference_steps=STEPS, sampler="heun"))
    base = sum(level >= experts.switch for level in levels)
    assert (base, len(levels) - base) == plan.evaluations


def guided_between(low: float, high: float) -> Callable[[Denoise], Denoise]:
    """Guidance at some levels alone (Kynkäänniemi et al. 2024, arXiv:2404.07724), written with the seam."""

    def wrap(denoise: Denoise) -> Denoise:
        assert isinstance(denoise, Guidance)
        unguided = replace(denoise, scale=1.0)
        return lambda x, sigma: (denoise if low <= sigma <= high else unguided)(x, sigma)

    return wrap


def test_guidance_in_an_interval_is_a_run_composed_by_hand() -> None:
    """The UNet on each side alone, Euler's method and the interval, written out."""
    pipe = pairs.base()
    pipe.wrap_denoiser = guided_between(LOW, HIGH)
    found = paint(pipe, "base", negative_prompt="blurry", guidance_scale=SCALE)

    request = pipe.request(
        prompt="a cup", num_inference_steps=STEPS, height=64, width=64, negative_prompt="blurry", generator=seeded(0)
    )
    grid = pipe.plan(request).grid
    with torch.no_grad():
        x, _ = first_noise(pipe, request, grid)
        both = pipe.condition(request, pipe.encode_prompt("a cup", negative_prompt="blurry"), (64, 64))
        negative, positive = (
            Conditioning(context, y)
            for context, y in zip(both.context.split(len(x)), both.y.split(len(x)), strict=True)
        )
        guided = []
        for sigma, sigma_next in pairwise(grid.sigmas.tolist()):
            scaled = x / (sigma**2 + 1) ** 0.5
            t = torch.tensor([grid.timestep(sigma)])
            noise = pipe.unet(scaled, t, positive.context, positive.y)
            if LOW <= sigma <= HIGH:
                guided.append(sigma)
                away = pipe.unet(scaled, t, negative.context, negative.y)
                noise = away + SCALE * (noise - away)
            x = x + (sigma_next - sigma) * noise
    assert 0 < len(guided) < STEPS
    checks.close(found, x, checks.PIPELINE, "guidance in an interval")


def test_a_wrapper_may_change_the_estimate() -> None:
    """One that always answers with the same picture ends there, by Euler's method, whatever the noise was."""
    pipe = pairs.base()
    target = torch.full((1, 4, 8, 8), 0.5)
    pipe.wrap_denoiser = lambda denoise: lambda x, sigma: target
    torch.testing.assert_close(paint(pipe, "base"), target)
