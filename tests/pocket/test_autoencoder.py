"""The autoencoder's latents are normalised exactly."""

import torch

from sdxl_ref.pocket.autoencoder import normalise
from sdxl_ref.pocket.models import BASE
from sdxl_ref.weights.checkpoint import build

EXACT = 1e-9  # in float64


def test_normalising_is_exact_and_leaves_the_pictures_alone() -> None:
    torch.manual_seed(0)
    vae = build("vae", BASE).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    before = vae.decode(vae.encode(images).mode())
    deviation = vae.encode(images).logvar
    normalise(vae, images)  # type: ignore[arg-type]
    posterior = vae.encode(images)
    z = posterior.mean * BASE.vae.scale_factor
    assert z.mean(dim=(0, 2, 3)).abs().max() < EXACT
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < EXACT
    assert (vae.decode(posterior.mean) - before).abs().max() < EXACT
    shift = posterior.logvar - deviation  # the same for every pixel of a channel
    assert shift.std(dim=(0, 2, 3)).max() < EXACT
