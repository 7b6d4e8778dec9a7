"""What text-to-image and the ensemble promise beyond parity: batches, hand-offs, memory, errors."""

import warnings
from pathlib import Path
from typing import Any

import checks
import peers
import pytest
import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.on_demand import Slot
from sdxl_ref.pipelines.ensemble import EnsembleRequest
from sdxl_ref.pipelines.text_to_image import TextToImageRequest

SMALL = {"height": 64, "width": 64, "num_inference_steps": 10, "output_type": "latent"}
SAMPLERS = ["euler", "ddim", "euler_ancestral", "ddpm", "heun", "dpmpp_2m", "dpmpp_2s_ancestral", "lms"]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


class Same(nn.Module):
    """One network for both sides: a small refiner UNet that reads x and t, and a fixed conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = peers.small_unet(seed=3)
        self.context, self.y = checks.normal(1, 77, 64, seed=1).float(), checks.normal(1, 1328, seed=2).float()

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, self.context.expand(len(x), -1, -1), self.y.expand(len(x), -1))


@pytest.fixture
def base() -> TextToImagePipeline:
    return TextToImagePipeline(peers.SMALL_BASE, **checks.small_base_parts())  # type: ignore[arg-type]


@pytest.fixture
def refiner() -> ImageToImagePipeline:
    return ImageToImagePipeline(peers.SMALL_REFINER, **checks.small_pipeline_parts())  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2s_ancestral"])
def test_image_i_of_a_batch_of_4_is_the_image_made_alone(
    base: TextToImagePipeline, refiner: ImageToImagePipeline, sampler: str
) -> None:
    """Within 1e-4 of the pictures' range, 0 to 1."""
    prompts, options = ["a", "b cup", "c on a table", "d"], SMALL | {"sampler": sampler, "output_type": "pt"}
    ensemble = EnsemblePipeline(base, refiner)
    batch = ensemble(prompts, generator=seeds(5, 6, 7, 8), **options).images
    for i in range(4):
        alone = ensemble(prompts[i], generator=seeds(5 + i), **options).images
        assert (batch[i] - alone[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("spacing", "steps", "start"), [("leading", 1, 1), ("leading", 2, 501), ("leading", 600, 600), ("linspace", 1, 0)]
)
def test_runs_that_start_far_below_pure_noise_warn(
    base: TextToImagePipeline, refiner: ImageToImagePipeline, spacing: str, steps: int, start: int
) -> None:
    """Before the first step; image-to-image starts below it anyway."""
    options = {"prompt": "", "height": 8, "width": 8, "spacing": spacing, "num_inference_steps": steps}
    with pytest.warns(UserWarning, match=f'"{spacing}" with {steps} steps starts at t = {start}, far below') as record:
        next(base.steps(TextToImageRequest(**options)))
    assert len(record) == 1
    if steps > 1:
        with pytest.warns(UserWarning, match=f"starts at t = {start}, far below"):
            next(EnsemblePipeline(base, refiner).steps(EnsembleRequest(**options, switch_step=1)))


@pytest.mark.parametrize("steps", [3, 20, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "sgm"])
def test_common_schedules_do_not_warn(base: TextToImagePipeline, spacing: str, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = TextToImageRequest(prompt="", height=8, width=8, spacing=spacing, num_inference_steps=steps)
        next(base.steps(request))


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_network_on_both_sides_is_the_single_run(
    base: TextToImagePipeline, refiner: ImageToImagePipeline, sampler: str, karras: bool
) -> None:
    """Bit for bit, in a batch; and in the model card's two calls for solvers of one evaluation without history."""
    base.unet = refiner.unet = Same()
    arguments = SMALL | {"sampler": sampler, "karras": karras, "num_images_per_prompt": 2}
    whole = base("a cup", generator=seeds(1, 2), **arguments).images
    assert torch.equal(whole, EnsemblePipeline(base, refiner)("a cup", generator=seeds(1, 2), **arguments).images)
    if sampler in ("euler", "ddim", "euler_ancestral", "ddpm"):
        draws = seeds(1, 2)
        part = base("a cup", generator=draws, denoising_end=0.8, **arguments).images
        finish = {"num_inference_steps": 10, "denoising_start": 0.8, "sampler": sampler, "karras": karras}
        finish |= {"image": part, "output_type": "latent", "generator": draws}
        assert torch.equal(whole, refiner(["a cup", "a cup"], **finish).images)


def test_two_networks_differ_from_one(base: TextToImagePipeline, refiner: ImageToImagePipeline) -> None:
    alone = base("a cup", generator=seeds(1), **SMALL).images
    assert not torch.equal(alone, EnsemblePipeline(base, refiner)("a cup", generator=seeds(1), **SMALL).images)
    everything = EnsemblePipeline(base, refiner)("a cup", generator=seeds(1), switch=1.0, **SMALL).images
    assert torch.equal(alone, everything)


def test_low_memory_is_the_same_run_with_one_network_at_a_time(small_base_file: Path, small_refiner_file: Path) -> None:
    plain = EnsemblePipeline.from_single_file(small_base_file, small_refiner_file)
    low = EnsemblePipeline.from_single_file(small_base_file, small_refiner_file, low_memory=True)
    arguments = SMALL | {"negative_prompt": "blurry", "sampler": "heun", "output_type": "pt"}
    assert torch.equal(
        plain("a cup", generator=seeds(1), **arguments).images, low("a cup", generator=seeds(1), **arguments).images
    )
    slot = low.unet.slot
    assert isinstance(slot, Slot)
    texts = ["base text_encoder_2", "base text_encoder", "refiner text_encoder_2"]
    assert slot.loads == [*texts, "base unet", "refiner unet", "base vae"]  # the experts change places once


def test_the_plan_tells_who_evaluates_what() -> None:
    plan = EnsemblePipeline.plan(EnsembleRequest(prompt="", num_inference_steps=50, sampler="heun"))
    assert plan.evaluations == (79, 20)  # 40 steps start in the base; the second half of the last one is below
    assert str(plan) == "base 79 evaluations, sigma 13.12 → 0.527; refiner 20, 0.527 → 0"


def test_first_noise_has_the_scale_of_spacing_and_sampler(base: TextToImagePipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeds(3)[0])
    for sampler, spacing, scale in (
        ("euler", "leading", "root"),
        ("euler", "sgm", "root"),
        ("euler", "trailing", "sigma"),
        ("heun", "linspace", "sigma"),
        ("ddim", "trailing", "root"),
        ("ddpm", "linspace", "root"),
    ):
        request = base.request_type(
            prompt="", height=64, width=64, sampler=sampler, spacing=spacing, generator=seeds(3)
        )
        grid = base.plan(request).grid
        sigma = float(grid.sigmas[0])
        expected = noise * ((1 + sigma**2) ** 0.5 if scale == "root" else sigma)
        assert torch.allclose(base.first_noise(request, grid)[0], expected, rtol=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "score on the base": ({"aesthetic_score": 6.0}, "aesthetic_score is of no use to an SDXL base"),
    "height": ({"height": 60}, "height must be a multiple of 8, found 60"),
    "width": ({"width": 0}, "width must be a multiple of 8, found 0"),
    "latents": ({"latents": torch.zeros(1, 3, 8, 8)}, r"expected latents \(1,4,h,w\), found \(1, 3, 8, 8\)"),
    "latents of another size": ({"latents": torch.zeros(1, 4, 9, 8)}, r"for this height and width"),
    "second prompts": ({"prompt_2": ["a", "b"]}, "found 2 for 1"),
    "end": ({"denoising_end": 0.001}, "leaves 0 of 10 steps"),
    "end outside": ({"denoising_end": 1.5}, "from 0 to 1, found 1.5"),
    "sampler": ({"sampler": "dpm"}, "unknown sampler"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(base: TextToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        base("a cup", **SMALL | arguments)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"switch": 0.0}, "above 0 and at most 1, found 0.0"),
        ({"switch": 1.2}, "above 0 and at most 1, found 1.2"),
        ({"switch": 0.9999}, "the refiner would run 0 steps"),
        ({"switch": 0.001}, "the base would run 0 steps"),
        ({"switch_sigma": 0.001}, "the refiner would run 0 steps"),
        ({"switch_sigma": 50.0}, "the base would run 0 steps"),
        ({"switch_step": 50}, "one expert would run 0 steps: expected from 1 to 49"),
        ({"switch_step": 0}, "one expert would run 0 steps: expected from 1 to 49"),
        ({"switch": 0.8, "switch_step": 3}, "give one of them"),
    ],
)
def test_bad_switches(switch: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnsemblePipeline.plan(EnsembleRequest(prompt="", **switch))


def test_the_wrong_kind_of_model(
    base: TextToImagePipeline, refiner: ImageToImagePipeline, small_base_file: Path
) -> None:
    with pytest.raises(InputError, match="expected a base"):
        TextToImagePipeline(peers.SMALL_REFINER, **checks.small_pipeline_parts())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a refiner"):
        EnsemblePipeline(base, base)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a refiner"):
        ImageToImagePipeline.from_single_file(small_base_file)


def test_noisy_latents_need_their_sigma(refiner: ImageToImagePipeline) -> None:
    with pytest.raises(InputError, match="strength"):
        refiner("a", latents=torch.zeros(1, 4, 8, 8))
