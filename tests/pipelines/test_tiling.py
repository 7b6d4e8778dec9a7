"""Pipelines by windows: what each window is told, and that one of them is the untiled run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import checks
import pairs
import pytest
import torch
from torch import Tensor

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.diffusion.tiles import Tile
from sdxl_ref.pipelines import tiling
from sdxl_ref.pipelines.pipeline import sample
from sdxl_ref.pipelines.request import Request
from sdxl_ref.pipelines.text_to_image import TextToImageRequest
from sdxl_ref.text.conditioning import Numbers

SEAM = 1.02  # gradient across a window's border against elsewhere
GRID = NoiseSchedule().grid(3, "leading")


@pytest.fixture(autouse=True)
def _for_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def pipe_and_request(kind: str, **options: Any) -> tuple[Any, Any]:
    if kind == "base":
        return pairs.base(), TextToImageRequest(prompt=["a cup", "a door"], num_inference_steps=3, **options)
    return pairs.refiner(), Request(prompt=["a cup", "a door"], num_inference_steps=3, **options)


def run(denoise: Any, request: Any, x: Tensor) -> Tensor:
    *_, last = sample(request, denoise, x, GRID.sigmas, None)
    return last.x


def noise(h: int, w: int) -> Tensor:
    return checks.normal(2, 4, h, w, seed=1).float() * GRID.sigmas[0]


@pytest.mark.parametrize("kind", ["refiner", "base"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_one_window_is_the_untiled_run_bit_for_bit(kind: str, guidance_scale: float) -> None:
    pipe, request = pipe_and_request(kind, guidance_scale=guidance_scale, crops_coords_top_left=(3, 5))
    text = pipe.encode_prompt(request.prompt, do_classifier_free_guidance=request.guided)
    x = noise(8, 6)
    untiled = pipe.denoiser(request, pipe.condition(request, text, (64, 48)), GRID)
    tiled = tiling.tiled_denoiser(pipe, request, text, (64, 48), GRID, tile=8, overlap=4)
    assert torch.equal(run(tiled, request, x), run(untiled, request, x))


@pytest.mark.parametrize("kind", ["refiner", "base"])
def test_each_window_is_told_its_crop(kind: str) -> None:
    """On both sides: what a window shows is that of the negative side's window too."""
    pipe, request = pipe_and_request(kind, crops_coords_top_left=(100, 0))
    told = tiling.request_of_tile(pipe, request, (128, 96), Tile(8, 2, 8, 6))
    positive, negative = pipe.sizes(told, (128, 96))
    score = {"refiner": 2.5, "base": 6.0}
    assert positive == Numbers((128, 96), (164, 16), (64, 48), 6.0)
    first = 0 if kind == "refiner" else 100  # image-to-image's negative crop is (0, 0) unless it is given
    assert (negative.original_size, negative.crop, negative.target_size) == ((128, 96), (64 + first, 16), (64, 48))
    assert score[kind] in (negative.aesthetic_score, positive.aesthetic_score)


def test_sizes_that_were_asked_for_stay() -> None:
    numbers = Numbers((4096, 4096), (0, 0), (1024, 1024), 6.0)
    assert tiling.crop(numbers, Tile(8, 0, 8, 8), (128, 64), 8) == replace(numbers, crop=(64, 0))


def test_the_network_reads_the_crop() -> None:
    pipe, request = pipe_and_request("base")
    text = pipe.encode_prompt(request.prompt)
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3]))
    try:
        tiling.tiled_denoiser(pipe, request, text, (96, 64), GRID, tile=8, overlap=4)(noise(12, 8), torch.tensor(1.0))
    finally:
        hook.remove()
    first, second = seen
    told = Numbers((96, 64), (32, 0), (64, 64), 6.0)
    expected = pipe.condition(
        replace(
            request, original_size=told.original_size, crops_coords_top_left=told.crop, target_size=told.target_size
        ),
        text,
        (96, 64),
    )
    assert torch.equal(second, expected.y)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["refiner", "base"])
def test_no_seam(kind: str) -> None:
    """The picture's mean gradient across the borders of windows, over all columns and channels, against elsewhere."""
    pipe, request = pipe_and_request(kind)
    text = pipe.encode_prompt(request.prompt)
    tiled = tiling.tiled_denoiser(pipe, request, text, (320, 256), GRID, tile=16, overlap=8)
    found = run(tiled, request, noise(40, 32))
    rows = found.diff(dim=2).abs().mean(dim=(0, 1, 3))
    columns = found.diff(dim=3).abs().mean(dim=(0, 1, 2))
    across: list[Tensor] = []
    elsewhere: list[Tensor] = []
    for gradient, borders in ((rows, (8, 16, 24, 32)), (columns, (8, 16, 24))):
        for i, value in enumerate(gradient):
            (across if i + 1 in borders else elsewhere).append(value)
    assert torch.stack(across).mean() / torch.stack(elsewhere).mean() <= SEAM
