"""What image-to-image promises beyond parity: inputs, randomness, plans, results, errors."""

from pathlib import Path
from typing import Any

import checks
import numpy as np
import pairs
import peers
import pytest
import torch
from pairs import seeds
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.pipelines import ImageToImagePipeline
from sdxl_ref.pipelines.request import Request
from sdxl_ref.pipelines.starts import image_tensor

BATCH = 1e-4  # of latents: a batch sums in another order


@pytest.fixture
def pipe() -> ImageToImagePipeline:
    return pairs.refiner()


def own_pipe() -> ImageToImagePipeline:
    """A pipeline whose weights a test may change."""
    return ImageToImagePipeline(pairs.REFINER, **pairs.own_networks("refiner"))


def run(pipe: ImageToImagePipeline, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**pairs.request(**{"generator": seeds(0)} | arguments)).images
    return images


# --- randomness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_image_i_of_a_batch_is_the_image_made_alone(pipe: ImageToImagePipeline, sampler: str) -> None:
    images = torch.cat([checks.normal(1, 3, 64, 64, seed=i, dtype=torch.float32).sigmoid() for i in range(4)])
    prompts = ["a", "b cup", "c on a table", "d"]
    batch = run(pipe, image=images, prompt=prompts, generator=seeds(5, 6, 7, 8), sampler=sampler)
    for i in range(4):
        alone = run(pipe, image=images[i : i + 1], prompt=prompts[i], generator=seeds(5 + i), sampler=sampler)
        assert (batch[i] - alone[0]).abs().max() <= BATCH


def test_same_seed_same_latents_and_no_global_state(pipe: ImageToImagePipeline) -> None:
    torch.manual_seed(1)
    first = run(pipe)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, run(pipe))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, run(pipe, generator=seeds(1)))
    assert not torch.equal(run(pipe, generator=None), run(pipe, generator=None))


class Recorder(nn.Module):
    """A UNet that keeps what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x, t))
        return self.inner(x, t, context, y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_noise_is_added_at_exactly_the_first_level(pipe: ImageToImagePipeline, strength: float) -> None:
    """The state before the first step is clean + sigmas[0] * noise, seen from what the network is given."""
    pipe.unet = unet = Recorder(pipe.unet)
    clean = checks.normal(1, 4, 8, 8, seed=1, dtype=torch.float32)
    run(pipe, image=clean, strength=strength)
    request = Request(prompt="", image=clean, strength=strength, num_inference_steps=10)
    sigma = pipe.plan(request).grid.sigmas[0]
    noise = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    x, t = unet.seen[0]
    assert torch.equal(x[:1], (clean + sigma * noise) / torch.sqrt(sigma**2 + 1))
    assert len(unet.seen) == round(10 * strength)
    assert float(NoiseSchedule().sigmas[int(t[0])]) == float(sigma)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_the_plan_is_known_before(pipe: ImageToImagePipeline) -> None:
    plan = pipe.plan(Request(prompt="", image=pairs.picture(), num_inference_steps=40))
    assert str(plan) == f"12 of 40 steps, sigma {NoiseSchedule().sigmas[11 * 25 + 1]:.4g} → 0"
    short = Request(**pairs.request(num_inference_steps=4))
    assert len(list(pipe.steps(short))) == len(pipe.plan(short).grid.timesteps) == 2


def test_every_run_ends_at_zero(pipe: ImageToImagePipeline) -> None:
    for spacing in ("leading", "trailing", "linspace", "sgm"):
        for karras in (False, True):
            plan = pipe.plan(Request(prompt="", image=pairs.picture(), spacing=spacing, karras=karras))
            assert float(plan.grid.sigmas[-1]) == 0.0
            assert len(plan.grid.sigmas) == len(plan.grid.timesteps) + 1 == 16


def test_the_official_strength_rule(pipe: ImageToImagePipeline) -> None:
    request = Request(prompt="", image=pairs.picture(), strength=0.4, num_inference_steps=10, strength_rule="sgm")
    assert len(pipe.plan(request).grid.timesteps) == 3


# --- what it starts from ------------------------------------------------------------------------------------------


def test_two_calls_equal_one(pipe: ImageToImagePipeline) -> None:
    """denoising_end, then denoising_start on its latents, is the undivided run bit for bit."""
    noisy = 14 * checks.normal(1, 4, 8, 8, seed=3, dtype=torch.float32)
    whole = run(pipe, image=noisy, strength=None, denoising_start=0.0)
    first = run(pipe, image=noisy, strength=None, denoising_start=0.0, denoising_end=0.6)
    assert torch.equal(whole, run(pipe, image=first, strength=None, denoising_start=0.6))


def test_latents_stand_in_for_a_noised_image(pipe: ImageToImagePipeline) -> None:
    clean = checks.normal(1, 4, 8, 8, seed=1, dtype=torch.float32)
    sigma = pipe.plan(Request(prompt="", strength=0.5, num_inference_steps=10)).grid.sigmas[0]
    noisy = clean + sigma * torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    assert torch.equal(run(pipe, image=clean), run(pipe, image=None, latents=noisy))


def test_pictures_are_fitted_and_tensors_are_taken_as_they_are(pipe: ImageToImagePipeline) -> None:
    """A PIL picture is cropped to multiples of 8; several have to be of one size."""
    assert run(pipe, image=pairs.picture().resize((70, 77))).shape == (1, 4, 9, 8)
    both = [pairs.picture(), pairs.picture()]
    assert run(pipe, image=both, generator=seeds(0, 1)).shape == (2, 4, 12, 16)
    with pytest.raises(InputError, match=r"expected pictures of one size, found \[\(96, 128\), \(64, 64\)\]"):
        run(pipe, image=[pairs.picture(), pairs.picture().resize((64, 64))])


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_what_a_call_returns_can_be_handed_in(pipe: ImageToImagePipeline, output_type: str) -> None:
    """As it is, and as the array that it holds: what the VAE encodes is what was decoded."""
    images = pipe(**pairs.request(generator=seeds(0), output_type=output_type)).images
    decoded = pipe(**pairs.request(generator=seeds(0), output_type="pt")).images  # (1,3,96,128) in [0,1]
    if output_type == "pil":
        decoded = (decoded * 255).round() / 255
    forms = [images, list(images)] if output_type != "pil" else [images, np.asarray(images[0])]
    for form in forms:
        request = Request(**pairs.request(image=form))
        assert torch.equal(image_tensor(pipe, request), 2 * decoded - 1)
    run(pipe, image=images)


def test_a_file_by_its_path(pipe: ImageToImagePipeline, tmp_path: Path) -> None:
    pairs.picture().save(tmp_path / "a.png")
    expected = run(pipe)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), [tmp_path / "a.png"]):
        assert torch.equal(run(pipe, image=path), expected)


# --- parts --------------------------------------------------------------------------------------------------------


def test_a_replaced_unet_takes_effect(pipe: ImageToImagePipeline) -> None:
    before = run(pipe)
    pipe.unet = peers.small_unet(pairs.REFINER.unet, seed=9)
    assert not torch.equal(before, run(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_vae_in_float32(dtype: torch.dtype) -> None:
    exact = own_pipe()
    wanted = run(exact)
    low = exact.to(dtype)
    assert low.dtype == dtype
    assert next(low.vae.parameters()).dtype == torch.float32
    found = run(low)
    assert found.dtype == torch.float32
    assert 0 < peers.distance(found, wanted) < 0.2


# --- bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "strength 0": ({"strength": 0.0}, "above 0 and at most 1, found 0.0"),
    "strength over 1": ({"strength": 1.01}, "above 0 and at most 1"),
    "no step left": ({"strength": 0.05}, "smallest strength is 0.1"),
    "0 steps": ({"num_inference_steps": 0}, "whole number from 1 to 1000, found 0"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, found 2.5"),
    "sampler": ({"sampler": "eular"}, "unknown sampler 'eular': did you mean 'euler'"),
    "spacing": ({"spacing": "even"}, "unknown spacing 'even'"),
    "strength rule": ({"strength_rule": "?"}, "unknown strength rule"),
    "output type": ({"output_type": "png"}, "unknown output_type 'png'"),
    "two starts": ({"denoising_start": 0.8, "strength": 0.3}, "give one of them"),
    "start of a picture": ({"denoising_start": 0.8, "strength": None}, r"expected latents \(b,4,h,w\), since"),
    "no image": (
        {"image": None, "strength": None},
        "a refiner has not learnt pure noise: give an image, or noisy latents",
    ),
    "image and latents": ({"latents": torch.zeros(1, 4, 8, 8)}, "give either image or latents"),
    "latents of no level": (
        {"image": None, "latents": torch.zeros(1, 4, 8, 8), "strength": None},
        "noisy latents, and the strength or the denoising_start",
    ),
    "channels": ({"image": torch.zeros(1, 5, 8, 8)}, r"found a tensor \(1, 5, 8, 8\)"),
    "channels last": ({"image": torch.zeros(64, 64, 3)}, r"found a tensor \(64, 64, 3\): move the channels"),
    "values": ({"image": 255 * torch.ones(1, 3, 64, 64)}, "expected values from 0 to 1"),
    "sides": ({"image": torch.zeros(1, 3, 60, 64)}, "multiples of 8"),
    "prompts and images": (
        {"prompt": ["a", "b", "c"], "image": torch.zeros(2, 3, 64, 64)},
        "one for each of 3 prompts",
    ),
    "negative prompts": (
        {"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"], "generator": seeds(0, 1, 2)},
        "found 2 for 3",
    ),
    "generators": ({"generator": seeds(0, 1)}, r"expected one generator per image \(1\), found 2"),
    "empty range": (
        {"image": torch.zeros(1, 4, 8, 8), "strength": None, "denoising_start": 0.9, "denoising_end": 0.5},
        "0 of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(pipe: ImageToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


@pytest.mark.parametrize("argument", ["prompt_2", "negative_prompt_2", "target_size", "negative_target_size"])
def test_arguments_the_refiner_cannot_use(pipe: ImageToImagePipeline, argument: str) -> None:
    with pytest.raises(InputError, match=f"{argument}.*refiner"):
        run(pipe, **{argument: (64, 64) if "size" in argument else "text"})


@pytest.mark.parametrize(
    ("part", "stage"),
    [("unet", "the UNet, on the step"), ("vae", "the VAE's encoder"), ("text_encoder_2", "the text encoder")],
)
def test_a_stage_that_turns_non_finite_is_named(part: str, stage: str) -> None:
    pipe = own_pipe()
    next(getattr(pipe, part).parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match=f"{stage}.*not finite"):
        run(pipe)


@pytest.mark.parametrize(
    ("part", "guidance_scale", "advised"), [("unet", 5.0, True), ("unet", 1.0, False), ("vae", 5.0, False)]
)
def test_a_lower_guidance_scale_is_advised_where_there_is_guidance(
    part: str, guidance_scale: float, advised: bool
) -> None:
    pipe = own_pipe()
    next(getattr(pipe, part).parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="check the weights with") as caught:
        run(pipe, guidance_scale=guidance_scale)
    assert ("lower the guidance scale, check" in str(caught.value)) == advised
