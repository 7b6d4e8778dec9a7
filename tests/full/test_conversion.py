"""Between layouts at full size: bit for bit, in little memory, and opened by diffusers itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import full_file
import measure
import peers
import pytest
import torch
from safetensors import safe_open

from sdxl_ref.config import BASE_1_0, REFINER_1_0, ModelConfig
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.opening import open_checkpoint

pytestmark = pytest.mark.full

CONVERT = [str(Path(sys.executable).with_name("weights-convert")), "convert"]
BOUND = 2e-6  # relative L2, float32


@pytest.fixture(scope="module", params=[REFINER_1_0, BASE_1_0], ids=["refiner", "base"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """Model, official file, folder made of it, file made of that; time and memory of both ways are printed."""
    source, place = full_file.full_file(request.param), tmp_path_factory.mktemp("converted")
    ways = (
        [source, place / "folder", "--to", "diffusers"],
        [place / "folder", place / "back.safetensors", "--to", "official"],
    )
    for way in ways:
        measured = measure.measure([*CONVERT, *map(str, way)])
        print(f"\nto {way[-1]}: {measured.seconds:.0f} s, peak anonymous memory {measured.peak_anonymous / 1e6:.0f} MB")
        assert 0 < measured.peak_anonymous < 1e9
    yield request.param, source, place / "folder", place / "back.safetensors"
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_round_trip_is_bit_identical(converted: tuple[ModelConfig, Path, Path, Path]) -> None:
    config, source, folder, back = converted
    assert (folder / EXTRAS_FILE).exists()
    with ExitStack() as stack:
        first, last = (stack.enter_context(safe_open(path, framework="pt")) for path in (source, back))
        assert set(first.keys()) == set(last.keys())
        count = 0
        for key in first.keys():  # noqa: SIM118
            assert torch.equal(first.get_tensor(key), last.get_tensor(key)), key
            count += 1
    print(f"\n{config.kind}: {count} tensors, bit for bit")


def test_diffusers_opens_the_folder(converted: tuple[ModelConfig, Path, Path, Path]) -> None:
    """Part by part, by its own and transformers' `from_pretrained`: outputs equal ours. One network at a time."""
    import diffusers
    import transformers

    config, source, folder, _ = converted
    checkpoint, generator = open_checkpoint(source), torch.Generator().manual_seed(0)
    x, context = (
        torch.randn(1, 4, 32, 32, generator=generator),
        torch.randn(1, 77, config.unet.context_dim, generator=generator),
    )
    y, t = torch.randn(1, config.unet.adm_in_channels, generator=generator), torch.tensor([150])
    tokens = torch.tensor([[49406, *range(1000, 1010), 49407, *[0] * 65]])

    def theirs(part: str, cls: Any) -> Any:
        return (
            cls.from_pretrained(folder / part, dtype=torch.float32)
            if "text" in part
            else cls.from_pretrained(folder / part, torch_dtype=torch.float32)
        )

    def close(what: str, ours: torch.Tensor, other: torch.Tensor) -> None:
        distance = peers.distance(ours, other)
        print(f"\n{config.kind}, {what}: relative L2 distance {distance:.1e}")
        assert distance <= BOUND

    with torch.no_grad():
        peer = theirs("unet", diffusers.UNet2DConditionModel)
        expected = peers.call_diffusers_unet(peer, x, t, context, y)
        del peer
        close("UNet", checkpoint.load("unet")(x, t, context, y), expected)
        peer = theirs("vae", diffusers.AutoencoderKL)
        close("VAE", checkpoint.load("vae").decode(x), peer.decode(x).sample)  # type: ignore[operator]
        peer = theirs("text_encoder_2", transformers.CLIPTextModelWithProjection)
        expected = peer(tokens).text_embeds
        del peer
        close("OpenCLIP, pooled", checkpoint.load("text_encoder_2")(tokens)[1], expected)


def test_diffusers_opens_the_file(converted: tuple[ModelConfig, Path, Path, Path]) -> None:
    """By its own `from_single_file`, with the configurations of our folder: it ends with the folder's weights, all of
    them, so that what it computes is what it computes from the folder."""
    import diffusers

    config, _, folder, back = converted
    name = "StableDiffusionXLImg2ImgPipeline" if config.kind == "refiner" else "StableDiffusionXLPipeline"
    opened = getattr(diffusers, name).from_single_file(back, config=str(folder), torch_dtype=torch.float16)
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder_2": "model"}
    for part, stem in parts.items():
        state = getattr(opened, part).state_dict()
        with safe_open(folder / part / f"{stem}.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                own = key if key in state else key.removeprefix("text_model.")
                assert torch.equal(state[own], file.get_tensor(key)), key
    print(f"\n{config.kind}: diffusers' from_single_file holds the same weights")
