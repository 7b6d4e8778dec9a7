"""The figures of `sdxl-ref evaluate`: each measure on cases whose answer is known."""

import math
from dataclasses import replace

import peers
import pytest
import torch
import torch.nn.functional as F
from training_data import CONFIGS

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.pocket.evaluate import (
    GROUPS,
    SEED,
    Share,
    denoising_errors,
    gain,
    nearer,
    prompts,
    redrawn,
    scores,
    vae_quality,
)

PIPELINES = {"base": TextToImagePipeline, "refiner": ImageToImagePipeline}
NEARLY_ALL = 0.95  # of drawn scenes are read all right
NEARLY_NONE = 0.025  # of scenes under another's caption
SAME_ERRORS = 1e-3  # relative: from the clean latents, which at low levels are nearly the noisy ones


def test_prompts_are_the_same_each_time_and_of_their_groups() -> None:
    chosen = prompts(40)
    again = prompts(40)
    assert chosen.all == again.all
    assert torch.equal(chosen.drawn, again.drawn)
    for group, (things, held_out) in GROUPS.items():
        assert len(chosen.scenes[group]) == 10
        assert all(len(s.things) == things and s.held_out == held_out for s in chosen.scenes[group])
    for count in (510, 4, 0, 10004):
        with pytest.raises(InputError, match=r"multiple of 4, .* from 8 to 10000, found"):
            prompts(count)


@pytest.mark.parametrize("count", [40, pytest.param(80, marks=pytest.mark.sweep)])
def test_scores_of_drawn_scenes_are_full_and_of_shuffled_ones_are_not(count: int) -> None:
    chosen = prompts(count)
    for group in scores(chosen.drawn, chosen).values():
        assert group["all_right"].right >= NEARLY_ALL * count / 4
    shuffled = scores(chosen.drawn.roll(1, 0), chosen)
    assert sum(group["all_right"].right for group in shuffled.values()) <= NEARLY_NONE * count


def test_wilsons_interval() -> None:
    low, high = Share(8, 10).interval
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Brown, Cai & DasGupta 2001
    assert Share(0, 50).interval[0] == pytest.approx(0, abs=1e-12)
    for n in range(1, 140):
        for right in range(n + 1):
            low, high = Share(right, n).interval
            assert low <= right / n <= high  # rounding included: the chart's bars need it
    assert str(Share(1, 2)).startswith("50.0% (1/2; ")


@pytest.mark.parametrize("count", [32, pytest.param(64, marks=pytest.mark.sweep)])
def test_nearer_knows_chance_from_a_difference(count: int) -> None:
    chosen = prompts(count)
    again = redrawn(chosen)
    kernel = torch.ones(3, 1, 5, 5) / 25
    blurred = F.conv2d(F.pad(chosen.drawn, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    differences = nearer(blurred, again, chosen)
    assert set(differences) == {128, 64, 32}
    finest = differences[128]
    assert 0 < finest.low < finest.value < finest.high  # blur takes most from the finest scale
    assert nearer(again, blurred, chosen)[128].high < 0
    assert all(tuple(difference) == (0, 0, 0) for difference in nearer(again, again, chosen).values())
    mirrored = nearer(redrawn(chosen), again.flip(3), chosen)
    assert all(difference.low < 0 < difference.high for difference in mirrored.values())  # as near in a mirror


def test_vae_quality_is_the_peak_signal_to_noise_ratio() -> None:
    class Noisy(torch.nn.Module):
        def encode(self, images: torch.Tensor) -> "Noisy":
            self.images = images
            return self

        def mode(self) -> torch.Tensor:
            return self.images

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z + 0.02  # of a range of 2: 0.01 of the picture's

    grey = torch.full((3, 3, 16, 16), 0.5)
    assert vae_quality(Noisy(), grey) == pytest.approx(-20 * math.log10(0.01), abs=1e-3)  # type: ignore[arg-type]


def test_gain_of_a_fifth() -> None:
    base = torch.rand(7, 200, generator=torch.Generator().manual_seed(0)) + 1
    share, low, high = gain(base, 0.8 * base)
    assert share == pytest.approx(0.2, abs=1e-5)
    assert low == pytest.approx(high, abs=1e-4)  # every picture gains the same
    share, low, high = gain(base, base.flip(1))
    assert low < 0 < high


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_denoising_errors_are_those_of_the_pipelines_own_denoiser(kind: str, prediction: str) -> None:
    """What the estimate of the clean latents is off by, divided by the level, whatever the network predicts."""
    config = replace(CONFIGS[kind], prediction=prediction)
    parts = peers.networks(config)
    pipe = PIPELINES[kind](config, **parts)
    chosen = prompts(8)
    levels = (50, 500)
    errors = denoising_errors(pipe, chosen, levels)
    assert errors.shape == (2, 8)
    request = pipe.request_type(prompt=[scene.caption for scene in chosen.all], guidance_scale=1.0)
    text = pipe.encode_prompt(request.prompt, do_classifier_free_guidance=False)
    grid = NoiseSchedule().grid(1000, "sgm")  # every level, with its training step
    denoise = pipe.denoiser(request, pipe.condition(request, text, (128, 128)), grid)
    clean = pipe.vae.encode(chosen.drawn * 2 - 1).mode() * config.vae.scale_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
    for row, t in zip(errors, levels, strict=True):
        sigma = NoiseSchedule().sigmas[t]
        off = (denoise(clean + sigma * noise, sigma) - clean) / sigma
        assert torch.allclose(row, (off**2).mean(dim=(1, 2, 3)), rtol=SAME_ERRORS)
