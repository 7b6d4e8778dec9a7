"""The whole image-to-image run against diffusers' `StableDiffusionXLImg2ImgPipeline` on the same weights."""

from typing import Any

import checks
import numpy as np
import pairs
import pytest
import torch

SCHEDULERS = {"euler": "EulerDiscreteScheduler", "ddpm": "DDPMScheduler"}
SEED = 7


def both(
    sampler: str = "euler", spacing: str = "leading", karras: bool = False, kind: str = "refiner", **arguments: Any
) -> tuple[Any, Any]:
    """Results of ours and diffusers' for the same arguments, each with a fresh generator of the same seed."""
    options: dict[str, Any] = {"use_karras_sigmas": True} if karras else {}
    if sampler == "ddpm":
        options["clip_sample"] = False
    call = pairs.request(**arguments)
    choice = {"sampler": sampler, "spacing": spacing, "karras": karras}
    mine = pairs.refiner(kind)(**call, **choice, generator=pairs.seeded(SEED))
    peer = pairs.diffusers_refiner(SCHEDULERS[sampler], spacing, kind, **options)
    theirs = peer(**({"strength": 0.3} | call), generator=pairs.seeded(SEED))
    return mine.images, theirs.images


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_samplers_and_spacings(sampler: str, spacing: str) -> None:
    """10 steps: "linspace" then falls on whole timesteps, which diffusers' DDPM would round otherwise."""
    checks.close(*both(sampler, spacing), checks.PIPELINE, f"{sampler} {spacing}")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_karras(spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest level of the peer's table moves every Karras level."""
    pairs.use_the_peers_table(monkeypatch)
    checks.close(*both(spacing=spacing, karras=True), checks.PIPELINE, f"Karras {spacing}")


@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, grey"])
def test_negative_prompt(negative_prompt: str | None) -> None:
    checks.close(*both(negative_prompt=negative_prompt), checks.PIPELINE, f"negative prompt {negative_prompt!r}")


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 12.0])
def test_guidance(guidance_scale: float) -> None:
    checks.close(*both(guidance_scale=guidance_scale), checks.PIPELINE, f"guidance {guidance_scale}")


def test_guidance_rescale() -> None:
    checks.close(*both(guidance_scale=9.0, guidance_rescale=0.7), checks.PIPELINE, "guidance rescale")


@pytest.mark.parametrize(("steps", "strength"), [(10, 1.0), (25, 0.3), (7, 0.99), (50, 0.1)])
def test_strength(steps: int, strength: float) -> None:
    checks.close(*both(num_inference_steps=steps, strength=strength), checks.PIPELINE, f"{steps} at {strength}")


def test_batch_of_prompts_and_images() -> None:
    prompts = ["a cup of coffee", "a red cat", "rain"]
    mine, theirs = both(prompt=prompts, negative_prompt=["x", "y", "z"], num_images_per_prompt=2)
    assert len(mine) == 6
    checks.close(mine, theirs, checks.PIPELINE, "batch")


@pytest.mark.parametrize(("start", "end"), [(0.8, None), (0.5, 0.8), (0.7, 0.91)])
def test_noisy_latents_with_denoising_start_and_end(start: float, end: float | None) -> None:
    latents = 3 * checks.normal(1, 4, 12, 16, seed=5, dtype=torch.float32)
    arguments = {"image": latents, "strength": None, "denoising_start": start, "denoising_end": end}
    mine = pairs.refiner()(**pairs.request(**arguments)).images
    theirs = pairs.diffusers_refiner()(**pairs.request(**arguments | {"strength": 0.3})).images
    checks.close(mine, theirs, checks.PIPELINE, f"denoising {start} to {end}")


FORMS = {
    "an array": lambda pixels: pixels,
    "arrays": list,
    "a tensor": lambda pixels: torch.from_numpy(pixels).permute(0, 3, 1, 2),
    "a tensor of one": lambda pixels: torch.from_numpy(pixels)[0].permute(2, 0, 1),
    "tensors": lambda pixels: list(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
    "a tensor in [-1, 1]": lambda pixels: 2 * torch.from_numpy(pixels).permute(0, 3, 1, 2) - 1,
}


@pytest.mark.filterwarnings("ignore:an image has values below 0")
@pytest.mark.parametrize("form", FORMS)
def test_arrays_and_tensors(form: str) -> None:
    pixels = np.asarray(pairs.picture(), dtype=np.float32)[None] / 255  # (1,h,w,3)
    checks.close(*both(image=FORMS[form](pixels)), checks.PIPELINE, form)


def test_scores_and_default_sizes() -> None:
    defaults = {"original_size": None, "crops_coords_top_left": (0, 0), "negative_original_size": None}
    scores = {"aesthetic_score": 7.25, "negative_aesthetic_score": 1.5}
    checks.close(*both(**defaults, **scores), checks.PIPELINE, "scores and default sizes")


def test_pictures_are_equal() -> None:
    """On a model with all of SDXL's levels."""
    mine, theirs = both(kind="small refiner", output_type="pil", num_inference_steps=4)
    difference = np.asarray(mine[0], dtype=int) - np.asarray(theirs[0], dtype=int)
    assert abs(difference).max() <= 1
    assert np.asarray(mine[0]).std() > 5  # not a uniform picture
