"""Masks against diffusers' `StableDiffusionXLInpaintPipeline` with a UNet of 4 channels, on the same weights.

It pastes the noised picture around the mask in between the steps. With Euler's method that is what ours does: where
every estimate outside is the picture's, the steps there lead along the picture with its own noise. With other samplers
it is not, and diffusers' pipeline is no measure. Its mask is sampled at one pixel of each latent cell, so that the
masks here have edges between the cells.
"""

from typing import Any

import checks
import numpy as np
import pairs
import pytest
from PIL import Image

SEED = 7


def mask() -> Image.Image:
    """Of the 96 x 128 pixels: a rectangle, by whole cells of 8."""
    pixels = np.zeros((96, 128), dtype=np.uint8)
    pixels[24:72, 40:104] = 255
    return Image.fromarray(pixels)


def both(kind: str, spacing: str = "leading", **arguments: Any) -> tuple[Any, Any]:
    call = pairs.request(**{"mask_image": mask(), "strength": 0.7} | arguments)
    size = {"height": 96, "width": 128}  # or it would be resized
    pipe = pairs.refiner() if kind == "refiner" else pairs.base()
    mine = pipe(**call, spacing=spacing, generator=pairs.seeded(SEED)).images
    return mine, pairs.diffusers_inpaint(kind, spacing=spacing)(**call, **size, generator=pairs.seeded(SEED)).images


@pytest.mark.parametrize(
    ("kind", "spacing"), [("refiner", "leading"), ("refiner", "trailing"), ("base", "leading"), ("base", "linspace")]
)
def test_models_and_spacings(kind: str, spacing: str) -> None:
    checks.close(*both(kind, spacing), checks.PIPELINE, f"{kind} {spacing}")


@pytest.mark.parametrize("strength", [0.25, 0.99])
def test_strength(strength: float) -> None:
    checks.close(*both("base", strength=strength), checks.PIPELINE, f"strength {strength}")
