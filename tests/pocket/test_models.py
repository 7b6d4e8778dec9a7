"""The pocket pair's sizes, and how its UNets start."""

import torch

from sdxl_ref.pocket.models import BASE, zero_residuals
from sdxl_ref.weights.checkpoint import build


def test_a_unet_starts_as_nothing() -> None:
    unet = zero_residuals(build("unet", BASE))  # type: ignore[arg-type]
    config = BASE.unet
    x = torch.randn(1, 4, 16, 16)
    y = torch.randn(1, config.adm_in_channels)
    assert not unet(x, torch.tensor([5]), torch.randn(1, 77, config.context_dim), y).any()
