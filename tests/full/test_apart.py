"""What it costs that a picture does not depend on its batch, at full size on a CPU."""

import statistics
import time

import pytest
import torch
from full_file import full_file

from sdxl_ref.networks.packing import pack
from sdxl_ref.weights.opening import open_checkpoint

pytestmark = pytest.mark.full
MOST = 1.3  # times one evaluation for all
PICTURES = 4


def test_pictures_apart_over_together() -> None:
    """Four pictures of 256 pixels, each with its guidance pair, in turns."""
    unet = pack(open_checkpoint(full_file()).load("unet", torch.float32), consume=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (4, 32, 32), "context": (77, 1280), "y": (2560,)}
    x, context, y = (torch.randn(2 * PICTURES, *shape, generator=generator) for shape in shapes.values())
    inputs = x, torch.full((2 * PICTURES,), 199), context, y
    pairs = list(zip(*(tensor.split(2) for tensor in inputs), strict=True))
    ratios = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            unet(*inputs)
            together = time.perf_counter() - began
            for pair in pairs:
                unet(*pair)
            ratios.append((time.perf_counter() - began - together) / together)
    print(f"{PICTURES} pictures apart over together: {statistics.median(ratios):.2f} ({together:.1f} s)")
    assert statistics.median(ratios) <= MOST
