"""Large latents by overlapping windows: one is the untiled run, and many leave no seam."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import checks
import peers
import pytest
import torch
from cases import sample
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.tiles import Tile, Tiled, spans
from sdxl_ref.networks.heap_model import Heap
from sdxl_ref.networks.memory_model import peak_memory
from sdxl_ref.weights.checkpoint import build_empty

ROUNDING = 1e-6  # of a sum of weights in float32
SIGMA = torch.tensor(2.0)


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that looks at one cell at a time."""
    return x / (sigma**2 + 1)


def pointwise(tile: Tile) -> Any:
    return shrink


@pytest.mark.parametrize("length", [1, 8, 16, 17, 24, 25, 39, 40, 100, 1000])
@pytest.mark.parametrize(("size", "overlap"), [(16, 4), (16, 1), (16, 8)])
def test_windows_cover_a_side(length: int, size: int, overlap: int) -> None:
    """From end to end, of one size, sharing what they should, with weights that sum to 1 everywhere."""
    windows = spans(length, size, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weights in windows:
        assert len(weights) == min(size, length)
        assert (weights > 0).all()
        total[start : start + len(weights)] += weights
    assert (total - 1).abs().max() < 1e-12
    starts = [start for start, _ in windows]
    assert starts[0] == 0
    assert starts[-1] == length - min(size, length)
    assert all(before + size - after >= overlap for before, after in pairwise(starts))
    if len(starts) > 1:  # and there are no more of them than needed
        assert (len(starts) - 2) * (size - overlap) + size < length


def test_weights_are_smooth() -> None:
    """No step from one cell to the next larger than that of a cosine over the cells shared."""
    for start, weights in spans(400, 128, 32):
        assert weights.diff().abs().max() <= 1.01 * torch.pi / 2 / 32
        assert weights[0] < 1e-2 or start == 0
        assert weights[-1] < 1e-2 or start == 400 - 128


@pytest.mark.parametrize("size", [(16, 16), (9, 16), (1, 1)], ids=str)
def test_one_window_is_the_untiled_run_bit_for_bit(size: tuple[int, int]) -> None:
    """With every sampler's state around it: it is the same function."""
    x = checks.normal(2, 4, *size, seed=1).float() * 10
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0])
    tiled = [step.x for step in SAMPLERS["dpmpp_2m"](Tiled(pointwise, 16, 4), x, sigmas)]
    whole = [step.x for step in SAMPLERS["dpmpp_2m"](shrink, x, sigmas)]
    assert all(map(torch.equal, tiled, whole))


@pytest.mark.parametrize("size", [(40, 16), (17, 31), (100, 40)], ids=str)
def test_what_looks_at_single_cells_sees_no_windows(size: tuple[int, int]) -> None:
    """Of several pictures at once."""
    x = checks.normal(3, 4, *size, seed=1).float()
    found = Tiled(pointwise, 16, 4)(x, SIGMA)
    assert (found - shrink(x, SIGMA)).abs().max() <= ROUNDING


def test_each_window_has_a_denoiser_of_its_own_and_one_is_worked_on_at_a_time() -> None:
    tiles: list[Tile] = []
    shapes: list[tuple[int, ...]] = []

    def make(tile: Tile) -> Any:
        tiles.append(tile)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            assert len(shapes) == len(tiles)
            assert torch.equal(x, whole[:, :, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width])
            return x

        return denoise

    whole = checks.normal(2, 4, 28, 12, seed=1).float()
    Tiled(make, 16, 4)(whole, SIGMA)
    assert tiles == [Tile(0, 0, 16, 12), Tile(12, 0, 16, 12)]
    assert set(shapes) == {(2, 4, 16, 12)}


def test_windows_that_disagree_fade_into_each_other() -> None:
    """A step of 1 between two windows becomes a slope: nowhere steeper than a cosine over the cells shared."""
    found = Tiled(lambda tile: lambda x, sigma: x + float(tile.top > 0), 16, 8)(torch.zeros(1, 4, 24, 16), SIGMA)
    assert torch.allclose(found[0, 0, [0, -1], 0], torch.tensor([0.0, 1.0]), atol=0.01)
    assert found.diff(dim=2).max() <= 1.01 * torch.pi / 2 / 8
    assert found.diff(dim=2).min() >= 0


@pytest.mark.parametrize("times", sample([2, 4], 2))
def test_sixteen_times_the_area_takes_the_memory_of_one_window(times: int) -> None:
    """Of the UNet's evaluation, planned by the model that tests hold to what is measured."""
    unet = build_empty("unet", peers.TINY_REFINER)

    def peak(side: int) -> int:
        x, context, y = (torch.empty(shape, device="meta") for shape in ((1, 4, side, side), (1, 77, 64), (1, 1328)))
        tiled = Tiled(lambda tile: lambda x, sigma: unet(x, sigma.expand(len(x)), context, y), 32, 8)
        return peak_memory(lambda: tiled(x, SIGMA.to("meta")), Heap(threshold=1, keeps_growing=False))

    assert peak(32 * times) <= 1.3 * peak(32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 4), "a tile's side must be a multiple of 8 latent cells, found 12"),
        ((0, 4), "a tile's side must be a multiple of 8 latent cells, found 0"),
        ((8.0, 4), "a tile's side must be a multiple of 8 latent cells, found 8.0"),
        ((16, 16), "the overlap of tiles must be from 1 to half of a tile's 16 latent cells, found 16"),
        ((16, 0), "the overlap of tiles must be from 1 to half of a tile's 16 latent cells, found 0"),
        ((16, 9), "the overlap of tiles must be from 1 to half of a tile's 16 latent cells, found 9"),
    ],
)
def test_sizes_that_no_windows_can_have(sizes: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Tiled(pointwise, *sizes)
    assert str(error.value) == message
