"""Runs in tiles: one tile is the whole run; the experts, masks and guidance work inside."""

from typing import Any

import pairs
import pytest
import torch

from sdxl_ref.pipelines import tiling

PIPELINES = {"refiner": pairs.refiner, "base": pairs.base, "ensemble": pairs.ensemble}


def run(kind: str, **arguments: Any) -> torch.Tensor:
    call = pairs.request(**{"generator": pairs.seeds(7), "strength": 0.6, "num_inference_steps": 5} | arguments)
    images: torch.Tensor = PIPELINES[kind]()(**call).images
    return images


@pytest.mark.parametrize("kind", PIPELINES)
def test_one_tile_is_the_whole_run(kind: str) -> None:
    assert run(kind, tile=True).equal(run(kind))


@pytest.mark.parametrize("kind", PIPELINES)
def test_several_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 64 pixels of a picture of 96 x 128: the UNet sees nothing else."""
    monkeypatch.setattr(tiling.tiled_denoiser, "__defaults__", (8, 4))
    whole = run(kind)
    seen: set[tuple[int, ...]] = set()
    unets = [pairs.refiner().unet, pairs.base().unet]
    hooks = [unet.register_forward_pre_hook(lambda _, xs: seen.add(tuple(xs[0].shape[2:]))) for unet in unets]
    tiled = run(kind, tile=True)
    for hook in hooks:
        hook.remove()
    assert seen == {(8, 8)}
    assert tiled.shape == whole.shape
    assert not tiled.equal(whole)


def test_the_autoencoder_in_bands() -> None:
    """`tiles_vae` of a pipeline: what it encodes and decodes is the same but for rounding."""
    pipe = pairs.refiner()
    call = pairs.request(generator=pairs.seeds(7), output_type="pt")
    whole = pipe(**call).images
    pipe.tiles_vae = True
    tiled = pipe(**call | {"generator": pairs.seeds(7)}).images
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4)
