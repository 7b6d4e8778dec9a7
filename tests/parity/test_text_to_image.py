"""Text-to-image and the two-call ensemble against diffusers on the same small weights."""

from typing import Any

import checks
import peers
import pytest
import torch

from sdxl_ref.ecosystem import ImageToImagePipeline, TextToImagePipeline

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
}


def request(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": "a cup of coffee on a table, morning light",
        "height": 96,
        "width": 128,
        "num_inference_steps": 10,
        "original_size": (1001, 777),
        "crops_coords_top_left": (3, 515),
        "target_size": (515, 1023),
        "output_type": "latent",
    }
    return arguments | changes


def base() -> TextToImagePipeline:
    return TextToImagePipeline(peers.SMALL_BASE, **checks.small_base_parts())  # type: ignore[arg-type]


def both(sampler: str = "euler", spacing: str = "leading", **arguments: Any) -> tuple[Any, Any]:
    name, config = SCHEDULERS[sampler]
    call = request(**arguments)
    theirs = checks.diffusers_text2img(name, spacing, **config)(**call, generator=torch.Generator().manual_seed(7))
    mine = base()(**call, sampler=sampler, spacing=spacing, generator=torch.Generator().manual_seed(7))
    return mine.images, theirs.images


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "ddpm"])
def test_samplers_and_spacings(sampler: str, spacing: str) -> None:
    checks.close(*both(sampler, spacing), checks.PIPELINE, f"{sampler} {spacing}")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing: str) -> None:
    checks.close(*both("ddim", spacing), checks.PIPELINE, f"ddim {spacing}")


@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, grey"])
def test_negative_prompt(negative_prompt: str | None) -> None:
    checks.close(*both(negative_prompt=negative_prompt), checks.PIPELINE, f"negative prompt {negative_prompt!r}")


def test_second_prompts_and_negative_sizes() -> None:
    second = {"prompt_2": "a red cat", "negative_prompt": "x", "negative_prompt_2": "y z"}
    sizes = {"negative_original_size": (333, 611), "negative_target_size": (100, 99)}
    for arguments in (second, sizes, sizes | {"negative_crops_coords_top_left": (5, 6)}):
        checks.close(*both(**arguments), checks.PIPELINE, str(sorted(arguments)))


def test_batch_and_handed_in_noise() -> None:
    checks.close(*both(prompt=["a", "b c"], num_images_per_prompt=2), checks.PIPELINE, "batch")
    checks.close(*both(latents=checks.normal(1, 4, 12, 16, seed=1, dtype=torch.float32)), checks.PIPELINE, "latents")


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "ddim"])
def test_two_call_ensemble(sampler: str) -> None:
    """The model card's form, where diffusers is right: solvers of one evaluation a step."""
    name, config = SCHEDULERS[sampler]
    call = request(original_size=None, crops_coords_top_left=(0, 0), target_size=None)
    finish = {"num_inference_steps": 10, "denoising_start": 0.8, "output_type": "latent", "prompt": call["prompt"]}

    draws = torch.Generator().manual_seed(7)
    theirs = checks.diffusers_text2img(name, **config)(**call, denoising_end=0.8, generator=draws).images
    theirs = checks.diffusers_img2img(name, **config)(**finish, image=theirs, generator=draws).images

    draws = torch.Generator().manual_seed(7)
    mine = base()(**call, denoising_end=0.8, generator=draws, sampler=sampler).images
    refiner = ImageToImagePipeline(peers.SMALL_REFINER, **checks.small_pipeline_parts())  # type: ignore[arg-type]
    mine = refiner(**finish, image=mine, generator=draws, sampler=sampler).images
    checks.close(mine, theirs, checks.PIPELINE, f"two calls, {sampler}")
