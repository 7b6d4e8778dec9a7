"""The autoencoder on large pictures, layer by layer in bands: the whole picture's numbers in half of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import checks
import peers
import pytest
import torch
from cases import sample
from torch import Tensor

from sdxl_ref import pack
from sdxl_ref.config import InputError, VAEConfig
from sdxl_ref.networks import bands, tiled_vae
from sdxl_ref.networks.packing import why_not
from sdxl_ref.networks.vae import AutoencoderKL

EXACT = 1e-12  # float64: a statistic of less than the whole map is 1e-3 off
FLOAT32 = 5e-6  # sums in another order, through 30 layers
DECIBELS = 60
SEAM = 1.02  # gradient across a band's border against elsewhere


@pytest.fixture(autouse=True)
def _for_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have every map cut into bands of so many rows, and the attention into blocks of a few queries."""

    def cut_into(rows: int) -> None:
        monkeypatch.setattr(bands, "LARGE", 0)
        monkeypatch.setattr(bands, "rows_of_a_band", lambda x: rows)
        monkeypatch.setattr(tiled_vae, "SCORES", 4 * 100)

    return cut_into


def vae(dtype: torch.dtype = torch.float64) -> AutoencoderKL:
    return peers.small_vae(VAEConfig(ch=32, num_res_blocks=1)).to(dtype)


def latents(*shape: int, seed: int = 1) -> Tensor:
    return checks.normal(*shape, seed=seed)


@pytest.mark.parametrize("rows", sample([1, 3, 8, 1000], 3))
@pytest.mark.parametrize("size", [(9, 5), (1, 7)], ids=str)
def test_bands_are_the_whole(size: tuple[int, int], rows: int, cut: Any) -> None:
    """To the last digits of float64, so that norms can have no other statistics; sides that no band divides."""
    network = vae()
    z = latents(2, 4, *size)
    pictures = latents(2, 3, 8 * size[0], 8 * size[1], seed=2)
    decoded = network.decode(z)
    posterior = network.encode(pictures)
    cut(rows)
    assert peers.distance(tiled_vae.decode(network, z), decoded) <= EXACT
    tiled = tiled_vae.encode(network, pictures)
    assert peers.distance(tiled.mean, posterior.mean) <= EXACT
    assert peers.distance(tiled.logvar, posterior.logvar) <= EXACT


@pytest.mark.parametrize("size", [(33, 50), (64, 31)], ids=str)
def test_pictures_of_sides_that_are_no_multiple_of_8(size: tuple[int, int], cut: Any) -> None:
    network = vae()
    pictures = latents(1, 3, *size)
    expected = network.encode(pictures).mean
    cut(4)
    assert peers.distance(tiled_vae.encode(network, pictures).mean, expected) <= EXACT


def test_every_layer_is_cut(cut: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No convolution of 3x3 and no norm but the attention's gets more than a band and its neighbours' rows."""
    network = vae(torch.float32)
    heights: list[int] = []
    forward = torch.nn.Conv2d.forward

    def watch(conv: torch.nn.Conv2d, x: Tensor) -> Tensor:
        heights.extend([x.shape[2]] if conv.kernel_size == (3, 3) else [])
        return forward(conv, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watch)
    cut(2)
    tiled_vae.decode(network, latents(1, 4, 8, 8).float())
    tiled_vae.encode(network, latents(1, 3, 64, 64).float())
    assert len(heights) > 200
    assert max(heights) <= 2 * (2 + 2)  # upsampled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_float64_as_untiled(dtype: torch.dtype, cut: Any) -> None:
    network = vae(dtype)
    z = latents(1, 4, 9, 6).to(dtype)
    exact = vae(dtype).double().decode(z.double())
    untiled = peers.distance(network.decode(z), exact)
    cut(5)
    decoded = tiled_vae.decode(network, z)
    assert decoded.dtype == dtype
    assert peers.distance(decoded, exact) <= 1.1 * untiled


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_packed_networks(dtype: torch.dtype, cut: Any) -> None:
    plain = vae(dtype)
    if why := why_not(plain):
        pytest.skip(why)
    packed: Any = pack(plain)
    z = latents(1, 4, 9, 6).to(dtype)
    pictures = latents(1, 3, 72, 48, seed=2).to(dtype)
    exact = vae(dtype).double()
    far = max(1.1 * peers.distance(plain.decode(z), exact.decode(z.double())), FLOAT32)
    cut(5)
    assert peers.distance(tiled_vae.decode(packed, z), exact.decode(z.double())) <= far
    far = max(1.1 * peers.distance(plain.encode(pictures).mean, exact.encode(pictures.double()).mean), FLOAT32)
    assert peers.distance(tiled_vae.encode(packed, pictures).mean, exact.encode(pictures.double()).mean) <= far


def test_small_pictures_are_the_untiled_ones_bit_for_bit() -> None:
    network = vae(torch.float32)
    z = latents(2, 4, 9, 5).float()
    pictures = latents(2, 3, 72, 40).float()
    assert torch.equal(tiled_vae.decode(network, z), network.decode(z))
    assert torch.equal(tiled_vae.encode(network, pictures).mean, network.encode(pictures).mean)


def test_the_network_is_afterwards_what_it_was(cut: Any) -> None:
    """Also after an error."""
    network = vae(torch.float32)
    cut(3)
    with pytest.raises(RuntimeError):
        tiled_vae.decode(network, latents(1, 5, 4, 4).float())
    tiled_vae.decode(network, latents(1, 4, 4, 4).float())
    assert not any("forward" in vars(module) for module in network.modules())


def test_who_watches_sees_it_whole(cut: Any) -> None:
    """The networks, sequences, blocks and layers alike."""
    network = vae(torch.float32)
    z = latents(1, 4, 6, 4).float()
    expected = network.decode(z)
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: shapes.update({name: tuple(output.shape[2:])})

    names = ["decoder", "decoder.mid", "decoder.up.0", "decoder.up.0.block.0", "decoder.up.0.block.0.conv1"]
    for name in [*names, "decoder.conv_out"]:
        network.get_submodule(name).register_forward_hook(watch(name))
    cut(3)
    assert peers.distance(tiled_vae.decode(network, z), expected) <= FLOAT32
    assert shapes == dict.fromkeys([*names, "decoder.conv_out"], (48, 32)) | {"decoder.mid": (6, 4)}


def test_other_layers_are_not_cut(cut: Any) -> None:
    """As users set them for pictures that tile the plane."""
    network = vae()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    z = latents(1, 4, 6, 4)
    expected = network.decode(z)
    cut(3)
    assert peers.distance(tiled_vae.decode(network, z), expected) <= EXACT


def test_other_networks_are_told() -> None:
    with pytest.raises(InputError, match="only an AutoencoderKL can be tiled, found Linear: run it untiled"):
        tiled_vae.decode(torch.nn.Linear(4, 4), torch.zeros(1, 4, 8, 8))


# --- at 1024 px, in processes of their own --------------------------------------------------------------------------

MEASURED = """
import json, sys, time
sys.path[:0] = {paths!r}
import torch, peak_memory, peers
from sdxl_ref.config import VAEConfig
from sdxl_ref.networks import bands, tiled_vae

bands.LARGE //= {finer}
bands.BAND //= {finer}
tiled_vae.SCORES //= {finer}
channels, side = (4, {size} // 8) if {what!r} == "decode" else (3, {size})
x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))

def run(encode, decode):
    with peak_memory.Peak() as peak:
        began = time.perf_counter()
        result = decode(x) if {what!r} == "decode" else encode(x).mean
    return result.double(), peak.bytes, time.perf_counter() - began

with torch.no_grad():
    network = peers.small_vae(VAEConfig(ch={ch}))
    network.encode(network.decode(torch.zeros(1, 4, 4, 4)))  # kernels are made at the first call
    tiled, *tiled_figures = run(lambda x: tiled_vae.encode(network, x), lambda z: tiled_vae.decode(network, z))
    whole, *whole_figures = run(network.encode, network.decode)
    noise = ((tiled - whole) ** 2).mean() / (whole.max() - whole.min()) ** 2
    rows = [(image[:, :, 1:] - image[:, :, :-1]).abs().mean(dim=(0, 1, 3)).tolist() for image in (tiled, whole)]
    print(json.dumps([tiled_figures, whole_figures, float(-10 * torch.log10(noise)), rows]))
"""


def seam_ratio(rows: list[float], height: int) -> float:
    """The mean gradient across the borders of bands of so many rows, against that of all other rows."""
    across = rows[height - 1 :: height]
    elsewhere = [gradient for i, gradient in enumerate(rows) if i % height != height - 1]
    return (sum(across) / len(across)) / (sum(elsewhere) / len(elsewhere))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("what", ["decode", "encode"])
@pytest.mark.parametrize(
    ("ch", "size", "finer"),
    [
        (32, 320, 32),
        pytest.param(32, 1024, 1, marks=pytest.mark.sweep),
        pytest.param(128, 1024, 1, marks=pytest.mark.full),
    ],
)
def test_half_the_memory_of_the_untiled_one(ch: int, size: int, finer: int, what: str) -> None:
    """`finer`: with bands of a part of their size, which is 1024 px in small."""
    compare_at(ch, size, what, finer)


def compare_at(ch: int, size: int, what: str, finer: int = 1) -> None:
    """Tiled against untiled in a fresh process: memory, quality, seams; the time is printed."""
    code = MEASURED.format(paths=[path for path in sys.path if path], ch=ch, size=size, what=what, finer=finer)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else small maps lie in memory that was freed before
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (tiled, tiled_seconds), (untiled, seconds), decibels, rows = json.loads(done.stdout)
    print(
        f"\n{what} at {size} px, ch {ch}: {untiled / 1e6:.0f} MB in {seconds:.1f} s untiled, {tiled / 1e6:.0f} MB "
        f"in {tiled_seconds:.1f} s tiled: {tiled / untiled:.2f} of the memory; {decibels:.0f} dB"
    )
    assert tiled <= untiled / 2
    assert decibels >= DECIBELS
    if what == "decode":
        band = max(1, bands.BAND // finer // (4 * 2 * ch * size))  # of maps of 2 * ch channels, the last level's first
        ratio, of_untiled = (seam_ratio(gradients, band) for gradients in rows)
        print(f"gradient across borders of bands of {band} rows over others: {ratio:.4f}, untiled {of_untiled:.4f}")
        assert ratio <= SEAM * max(1.0, of_untiled)  # few rows of a small picture are not like the others anyway
