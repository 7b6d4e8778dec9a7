"""The autoencoder in bands of rows: the same as the whole, in less memory."""

from __future__ import annotations

from typing import Any

import checks
import peers
import pytest
import torch
from torch import Tensor

from sdxl_ref import pack
from sdxl_ref.networks import bands

FLOAT32 = 5e-6


@pytest.fixture(autouse=True)
def _for_inference() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("size", [(5, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_bands_are_the_whole(
    size: tuple[int, int], rows: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = peers.small_vae(seed=0).eval().requires_grad_(False)
    packed: Any = pack(plain)
    z = checks.normal(2, 4, *size, seed=1).float().contiguous(memory_format=layout)
    picture = checks.normal(2, 3, 8 * size[0], 8 * size[1], seed=2).float().contiguous(memory_format=layout)
    monkeypatch.setattr(bands, "LARGE", 0)
    monkeypatch.setattr(bands, "rows_of_a_band", lambda x: rows)
    counted = []
    convolve = bands.convolve
    monkeypatch.setattr(bands, "convolve", lambda *a, **k: counted.append(1) or convolve(*a, **k))
    assert peers.distance(packed.decode(z), plain.decode(z)) <= FLOAT32
    assert len(counted) > 20
    assert peers.distance(packed.encode(picture).mean, plain.encode(picture).mean) <= FLOAT32


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_statistics_are_those_of_the_whole_map(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also far from 0, where a difference of squares would lose them."""
    norm = torch.nn.GroupNorm(32, 64)
    norm.weight.copy_(checks.normal(64, seed=1))
    norm.bias.copy_(checks.normal(64, seed=2))
    x = (checks.normal(2, 64, 9, 5, seed=0) + offset).float()
    monkeypatch.setattr(bands, "rows_of_a_band", lambda x: 2)
    exact = torch.nn.functional.silu(norm.double()(x.double()))
    plain = torch.nn.functional.silu(norm.float()(x))
    ours = bands.normalize(x, norm)(x)
    assert peers.distance(ours, exact) <= 1.5 * peers.distance(plain, exact) + 1e-7


def test_who_watches_a_layer_sees_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: Any = pack(peers.small_vae(seed=0).eval().requires_grad_(False))
    monkeypatch.setattr(bands, "LARGE", 0)
    seen: list[Tensor] = []
    packed.decoder.up[0].block[0].conv1.register_forward_hook(lambda *call: seen.append(call[2]))
    packed.decode(checks.normal(1, 4, 5, 4, seed=1).float())
    assert [tuple(output.shape[2:]) for output in seen] == [(40, 32)]


def circular(vae: Any) -> None:
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]


def wider(vae: Any) -> None:
    torch.manual_seed(0)
    vae.decoder.up[0].block[0].conv1 = torch.nn.Conv2d(64, 32, 5, padding=2)


def by_class(vae: Any) -> None:
    """Somebody's own kinds of layers."""

    class Negative(torch.nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    class Doubled(torch.nn.Conv2d):
        def _conv_forward(self, x: Tensor, *weights: Any) -> Tensor:
            return 2 * super()._conv_forward(x, *weights)

    vae.decoder.up[0].block[0].norm1.__class__ = Negative
    vae.decoder.up[0].block[1].conv1.__class__ = Doubled
    vae.decoder.up[0].block[1].norm2 = torch.nn.GroupNorm(32, 32, affine=False)


@pytest.mark.parametrize("change", [circular, wider, by_class])
def test_other_layers_are_not_cut_into_bands(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users set them for pictures that tile, or to try something."""
    plain = peers.small_vae(seed=0).eval().requires_grad_(False)
    packed: Any = pack(plain)
    change(plain)
    change(packed)
    monkeypatch.setattr(bands, "LARGE", 0)
    monkeypatch.setattr(bands, "rows_of_a_band", lambda x: 3)
    z = checks.normal(1, 4, 5, 4, seed=1).float()
    assert peers.distance(packed.decode(z), plain.decode(z)) <= FLOAT32
