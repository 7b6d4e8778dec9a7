"""Networks against their peers on the same seeded weights: exact in float64, close in float32."""

import statistics
from collections.abc import Callable

import checks
import peers
import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("kind", ["refiner", "base"])
@pytest.mark.parametrize("size", [(12, 20), (13, 9), (1, 1), (8, 31)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, checks.EXACT), (torch.float32, 5e-6)])
def test_unet(kind: str, size: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    checks.check_unet(kind, size, dtype, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, checks.EXACT), (torch.float32, 5e-6)])
def test_vae(dtype: torch.dtype, bound: float) -> None:
    checks.check_vae(dtype, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, checks.EXACT), (torch.float32, 5e-6)])
def test_openclip(dtype: torch.dtype, bound: float) -> None:
    checks.check_openclip(dtype=dtype, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, checks.EXACT), (torch.float32, 5e-6)])
def test_clip(dtype: torch.dtype, bound: float) -> None:
    checks.check_clip(dtype, bound)


def test_integer_and_fractional_timesteps() -> None:
    unet = peers.small_unet()
    x, context, y = checks.normal(1, 4, 8, 8, seed=0), checks.normal(1, 77, 64, seed=1), checks.normal(1, 1328, seed=2)
    whole, real, between = (
        unet(x.float(), t, context.float(), y.float())
        for t in (torch.tensor([199]), torch.tensor([199.0]), torch.tensor([199.5]))
    )
    assert torch.equal(whole, real)
    assert not torch.equal(real, between)


def unet_outputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, diffusers' and the exact result (float64 on the same rounded weights and inputs)."""
    unet = peers.small_unet(seed=seed).to(dtype)
    x, context = (
        checks.normal(1, 4, 16, 16, seed=seed, dtype=dtype),
        checks.normal(1, 77, 64, seed=seed + 1, dtype=dtype),
    )
    y, t = checks.normal(1, 1328, seed=seed + 2, dtype=dtype), torch.tensor([100.0])
    theirs = peers.call_diffusers_unet(peers.diffusers_unet(unet), x, t, context, y)
    mine = unet(x, t, context, y)
    return mine, theirs, unet.double()(x.double(), t, context.double(), y.double())


def decoder_outputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    vae, z = peers.small_vae(seed=seed).to(dtype), checks.normal(1, 4, 8, 8, seed=seed, dtype=dtype)
    theirs, mine = peers.diffusers_vae(vae).decode(z).sample, vae.decode(z)
    return mine, theirs, vae.double().decode(z.double())


def encoder_outputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    vae, images = peers.small_vae(seed=seed).to(dtype), checks.normal(1, 3, 64, 64, seed=seed, dtype=dtype).clamp(-1, 1)
    theirs, mine = peers.diffusers_vae(vae).encode(images).latent_dist.mean, vae.encode(images).mean
    return mine, theirs, vae.double().encode(images.double()).mean


def pooled_outputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    encoder = peers.small_openclip(seed=seed).to(dtype)
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    tokens[0, :10] = torch.tensor([49406, *range(500, 4500, 500), 49407])
    theirs, mine = peers.transformers_openclip(encoder)(tokens).text_embeds, encoder(tokens)[1]
    return mine, theirs, encoder.double()(tokens)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [unet_outputs, decoder_outputs, encoder_outputs, pooled_outputs])
def test_rounding_error_is_no_larger_than_the_peers(
    outputs: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    """Distance to float64 over the peer's own distance to it: the median of 20 seeds is at most 1.1."""
    ratios = []
    for seed in range(20):
        mine, theirs, exact = outputs(seed, dtype)
        ratios.append(peers.distance(mine, exact) / peers.distance(theirs, exact))
    print(f"{outputs.__name__} {dtype}: median ratio {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= 1.1
