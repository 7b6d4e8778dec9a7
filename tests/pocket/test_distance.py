"""Patch distances: where two sets of pictures differ, and the pyramid below them."""

import pytest
import torch
import torch.nn.functional as F

from sdxl_ref.pocket.distance import patch_distances, pyramid
from sdxl_ref.pocket.evaluate import prompts, redrawn


@pytest.mark.parametrize("count", [24, pytest.param(64, marks=pytest.mark.sweep)])
def test_patch_distances_know_where_two_sets_differ(count: int) -> None:
    """Little for scenes that are drawn again; more for blur, and at the finest scale most; more for another tone."""
    chosen = prompts(count)
    drawn = chosen.drawn
    assert set(patch_distances(drawn, drawn)) == {128, 64, 32}
    again = patch_distances(redrawn(chosen), drawn)
    kernel = torch.ones(3, 1, 5, 5) / 25
    blurred = F.conv2d(F.pad(drawn, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    far = patch_distances(blurred, drawn)
    assert far[128] > 3 * again[128]
    assert far[128] > far[32]
    brighter = patch_distances((drawn + 0.2).clamp(0, 1), drawn)
    assert brighter[32] > 2 * again[32]


def test_a_pyramid_adds_up_and_tells_nothing_of_an_even_slope() -> None:
    """Burt & Adelson: what a level's half tells of it lies where it was taken, so that a slope leaves nothing."""
    slope = (torch.arange(64.0) / 64).expand(1, 3, 64, 64)
    fine, middle, rest = pyramid(slope, 3)
    assert fine[:, :, 8:-8, 8:-8].abs().max() < 1e-6
    assert middle[:, :, 8:-8, 8:-8].abs().max() < 1e-6
    assert rest.shape[-1] == 16
