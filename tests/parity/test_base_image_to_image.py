"""The base on pictures, against diffusers' `StableDiffusionXLImg2ImgPipeline` with the base's weights."""

from typing import Any

import checks
import pairs
import pytest

from sdxl_ref import ImageToImagePipeline

SEED = 7
SCHEDULERS = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler"}


def both(sampler: str = "euler", spacing: str | None = "leading", **arguments: Any) -> tuple[Any, Any]:
    """Results of ours and diffusers' for the same arguments, each with a fresh generator of the same seed."""
    options = {"clip_sample": False, "set_alpha_to_one": True} if sampler == "ddim" else {}
    call = pairs.request(**{"target_size": (515, 1023)} | arguments)
    mine = pairs.base()(**call, sampler=sampler, spacing=spacing, generator=pairs.seeded(SEED))
    peer = pairs.diffusers_base_img2img(SCHEDULERS[sampler], spacing=spacing or "leading", **options)
    return mine.images, peer(**call, generator=pairs.seeded(SEED)).images


@pytest.mark.parametrize(
    ("sampler", "spacing"), [("euler", "leading"), ("euler", "trailing"), ("euler", "linspace"), ("ddim", "leading")]
)
def test_samplers_and_spacings(sampler: str, spacing: str) -> None:
    checks.close(*both(sampler, spacing), checks.PIPELINE, f"{sampler} {spacing}")


@pytest.mark.parametrize(("steps", "strength"), [(10, 1.0), (25, 0.3), (7, 0.99)])
def test_strength(steps: int, strength: float) -> None:
    checks.close(*both(num_inference_steps=steps, strength=strength), checks.PIPELINE, f"{steps} at {strength}")


@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, grey"])
def test_negative_prompt(negative_prompt: str | None) -> None:
    checks.close(*both(negative_prompt=negative_prompt), checks.PIPELINE, f"negative prompt {negative_prompt!r}")


def test_prompts_of_the_second_encoder() -> None:
    mine, theirs = both(prompt_2="a dog in the rain", negative_prompt_2="grey")
    checks.close(mine, theirs, checks.PIPELINE, "prompt_2")


def test_own_levels() -> None:
    """From the picture on: `strength` cuts the list, as it cuts a spacing's."""
    timesteps = [901, 750, 601, 450, 301, 220, 101, 50, 21, 1]
    mine, theirs = both(spacing=None, timesteps=timesteps, num_inference_steps=10)
    checks.close(mine, theirs, checks.PIPELINE, "own timesteps")


def test_the_pipeline_of_the_refiner_runs_the_base_as_well() -> None:
    call = pairs.request(generator=pairs.seeded(SEED))
    [one] = ImageToImagePipeline(pairs.BASE, **pairs.shared("base"))(**call).images
    [other] = pairs.base()(**call | {"generator": pairs.seeded(SEED)}).images
    assert one.equal(other)
