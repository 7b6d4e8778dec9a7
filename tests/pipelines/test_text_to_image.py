"""What text-to-image promises beyond parity: batches, the first noise, two calls, errors."""

import warnings
from typing import Any

import pairs
import pytest
import torch
from pairs import SMALL, seeds

from sdxl_ref.config import InputError
from sdxl_ref.pipelines import TextToImagePipeline
from sdxl_ref.pipelines.first_noise import first_noise
from sdxl_ref.pipelines.request import Request


@pytest.fixture
def base() -> TextToImagePipeline:
    return pairs.base()


def test_image_i_of_a_batch_is_the_image_made_alone(base: TextToImagePipeline) -> None:
    """Within 1e-4 of the pictures' range, 0 to 1: a batch sums in another order."""
    prompts = ["a", "b cup", "c on a table"]
    options = SMALL | {"sampler": "euler_ancestral", "output_type": "pt"}
    batch = base(prompts, generator=seeds(5, 6, 7), **options).images
    for i, prompt in enumerate(prompts):
        alone = base(prompt, generator=seeds(5 + i), **options).images
        assert (batch[i] - alone[0]).abs().max() <= 1e-4


def test_each_prompt_makes_its_pictures_in_a_row(base: TextToImagePipeline) -> None:
    both = base(["a cup", "a dog"], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **SMALL).images
    second = base("a dog", num_images_per_prompt=2, generator=seeds(3, 4), **SMALL).images
    torch.testing.assert_close(both[2:], second, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "shape"), [({}, (128, 128)), ({"height": 64}, (8, 128)), ({"width": 8}, (128, 1))])
def test_a_side_that_is_not_given_is_the_training_pictures(
    base: TextToImagePipeline, size: dict[str, int], shape: tuple[int, int]
) -> None:
    request = Request(prompt="", generator=seeds(1), **size)
    assert first_noise(base, request, base.plan(request).grid)[0].shape == (1, 4, *shape)


@pytest.mark.parametrize(
    ("spacing", "steps", "start"), [("leading", 1, 1), ("leading", 2, 501), ("leading", 600, 600), ("linspace", 1, 0)]
)
def test_runs_that_start_far_below_pure_noise_warn(
    base: TextToImagePipeline, spacing: str, steps: int, start: int
) -> None:
    """Before the first step; image-to-image starts below it anyway."""
    request = Request(prompt="", height=8, width=8, spacing=spacing, num_inference_steps=steps)
    with pytest.warns(UserWarning, match=f'"{spacing}" with {steps} steps starts at t = {start}, far below') as record:
        next(base.steps(request))
    assert len(record) == 1


@pytest.mark.parametrize("steps", [3, 20, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "sgm"])
def test_common_schedules_do_not_warn(base: TextToImagePipeline, spacing: str, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = Request(prompt="", height=8, width=8, spacing=spacing, num_inference_steps=steps)
        next(base.steps(request))


@pytest.mark.parametrize(
    ("sampler", "spacing", "scale"),
    [
        ("euler", "leading", "root"),
        ("euler", "sgm", "root"),
        ("euler", "trailing", "sigma"),
        ("heun", "linspace", "sigma"),
        ("ddim", "trailing", "root"),
        ("ddpm", "linspace", "root"),
    ],
)
def test_first_noise_has_the_scale_of_spacing_and_sampler(
    base: TextToImagePipeline, sampler: str, spacing: str, scale: str
) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeds(3)[0])
    request = Request(prompt="", height=64, width=64, sampler=sampler, spacing=spacing, generator=seeds(3))
    grid = base.plan(request).grid
    sigma = float(grid.sigmas[0])
    expected = noise * ((1 + sigma**2) ** 0.5 if scale == "root" else sigma)
    assert torch.allclose(first_noise(base, request, grid)[0], expected, rtol=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "score on the base": ({"aesthetic_score": 6.0}, "aesthetic_score is of no use to an SDXL base"),
    "height": ({"height": 60}, "height must be a multiple of 8, from 8 to 16384, found 60"),
    "endless": ({"height": 10**12}, "height must be a multiple of 8, from 8 to 16384, found 1000000000000"),
    "pictures": (
        {"num_images_per_prompt": 1001},
        "num_images_per_prompt 1001 for 1 prompts: expected 1 to 1000 pictures in all",
    ),
    "width": ({"width": 0}, "width must be a multiple of 8, from 8 to 16384, found 0"),
    "latents": ({"latents": torch.zeros(1, 3, 8, 8)}, r"expected latents \(1,4,h,w\), found \(1, 3, 8, 8\)"),
    "latents of another size": ({"latents": torch.zeros(1, 4, 9, 8)}, r"for this height and width"),
    "second prompts": ({"prompt_2": ["a", "b"]}, "found 2 for 1"),
    "end": (
        {"denoising_end": 0.001},
        "0 of 10 steps lie between step 0, where the run begins, and denoising_end 0.001",
    ),
    "end outside": ({"denoising_end": 1.5}, "from 0 to 1, found 1.5"),
    "sampler": ({"sampler": "dpm"}, "unknown sampler 'dpm': did you mean 'ddpm'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(base: TextToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        base("a cup", **SMALL | arguments)


def test_a_refiner_is_refused() -> None:
    with pytest.raises(InputError, match="expected a base"):
        TextToImagePipeline(pairs.REFINER, **pairs.networks("refiner"))
