"""Text-to-image and the two-call ensemble against diffusers on the same small weights."""

from typing import Any

import checks
import numpy as np
import pairs
import pytest
import torch

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
SEED = 7


def both(sampler: str = "euler", spacing: str = "leading", kind: str = "base", **arguments: Any) -> tuple[Any, Any]:
    """Results of ours and diffusers' for the same arguments, each with a fresh generator of the same seed."""
    name, options = SCHEDULERS[sampler]
    call = pairs.text_request(**arguments)
    peer = pairs.diffusers_base(name, spacing, kind, **options)
    theirs = peer(**call, generator=pairs.seeded(SEED))
    mine = pairs.base(kind)(**call, sampler=sampler, spacing=spacing, generator=pairs.seeded(SEED))
    return mine.images, theirs.images


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "ddpm"])
def test_samplers_and_spacings(sampler: str, spacing: str) -> None:
    checks.close(*both(sampler, spacing), checks.PIPELINE, f"{sampler} {spacing}")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing: str) -> None:
    checks.close(*both("ddim", spacing), checks.PIPELINE, f"ddim {spacing}")


def test_dpmpp_2m_from_its_own_first_noise() -> None:
    """With "trailing", where diffusers' DPMSolverMultistep has Euler's levels and not its first noise."""
    checks.close(*both("dpmpp_2m", "trailing"), checks.PIPELINE, "dpmpp_2m trailing")


@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, grey"])
def test_negative_prompt(negative_prompt: str | None) -> None:
    checks.close(*both(negative_prompt=negative_prompt), checks.PIPELINE, f"negative prompt {negative_prompt!r}")


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_2": "a red cat", "negative_prompt": "x", "negative_prompt_2": "y z"},
        {"negative_original_size": (333, 611), "negative_target_size": (100, 99)},
        {
            "negative_original_size": (333, 611),
            "negative_target_size": (100, 99),
            "negative_crops_coords_top_left": (5, 6),
        },
    ],
    ids=["prompts", "sizes", "sizes and crop"],
)
def test_second_prompts_and_negative_sizes(arguments: dict[str, Any]) -> None:
    checks.close(*both(**arguments), checks.PIPELINE, str(sorted(arguments)))


def test_batch() -> None:
    checks.close(*both(prompt=["a", "b c"], num_images_per_prompt=2), checks.PIPELINE, "batch")


def test_handed_in_noise() -> None:
    noise = checks.normal(1, 4, 12, 16, seed=1, dtype=torch.float32)
    checks.close(*both(latents=noise), checks.PIPELINE, "latents")


def test_pictures_are_equal() -> None:
    """On a model with all of SDXL's levels."""
    mine, theirs = both(kind="small base", output_type="pil", num_inference_steps=4)
    difference = np.asarray(mine[0], dtype=int) - np.asarray(theirs[0], dtype=int)
    assert abs(difference).max() <= 1
    assert np.asarray(mine[0]).std() > 5  # not a uniform picture


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "ddim"])
def test_two_call_ensemble(sampler: str) -> None:
    """The model card's form, where diffusers is right: solvers of one evaluation a step."""
    name, options = SCHEDULERS[sampler]
    call = pairs.text_request(original_size=None, crops_coords_top_left=(0, 0), target_size=None)
    finish = {"num_inference_steps": 10, "denoising_start": 0.8, "output_type": "latent", "prompt": call["prompt"]}

    draws = pairs.seeded(SEED)
    handed = pairs.diffusers_base(name, **options)(**call, denoising_end=0.8, generator=draws).images
    theirs = pairs.diffusers_refiner(name, **options)(**finish, image=handed, generator=draws).images

    draws = pairs.seeded(SEED)
    handed = pairs.base()(**call, denoising_end=0.8, generator=draws, sampler=sampler).images
    mine = pairs.refiner()(**finish, image=handed, generator=draws, sampler=sampler).images
    checks.close(mine, theirs, checks.PIPELINE, f"two calls, {sampler}")
