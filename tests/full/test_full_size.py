"""At full size, in float32: each network against its peer on the same weights."""

import gc
from collections.abc import Iterator
from pathlib import Path

import full_file
import peers
import pytest
import torch
from torch import nn

from sdxl_ref.checkpoint import Checkpoint, open_checkpoint
from sdxl_ref.tokenizer import tokenize

BOUND = 2e-6  # relative L2; the two references on the same weights are 0.7e-6 to 1.7e-6 apart
PROMPTS = ["a cup of coffee on a wooden table, steam in the morning light", ""]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def path() -> Path:
    return full_file.full_file()


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """One network in memory at a time."""
    with torch.no_grad():
        yield
    gc.collect()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    distance = peers.distance(ours, theirs)
    print(f"\n{what}: relative L2 distance {distance:.2e}")
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-2
    assert distance <= BOUND


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_unet(checkpoint: Checkpoint) -> None:
    """At 512x512, t = 0, 199 and 999. The peer shares our tensors: one copy of the weights in memory."""
    ours = checkpoint.load("unet", torch.float32)
    assert parameters(ours) == 2_259_526_660
    theirs = peers.diffusers_unet(ours)
    assert theirs.conv_in.weight.data_ptr() == ours.input_blocks[0][0].weight.data_ptr()
    x, context, y = noise(1, 4, 64, 64), noise(1, 77, 1280, seed=1), noise(1, 2560, seed=2)
    for t in (0, 199, 999):
        timesteps = torch.tensor([t])
        expected = peers.call_diffusers_unet(theirs, x, timesteps, context, y)
        check(f"UNet, 512x512, t = {t}", ours(x, timesteps, context, y), expected)


def test_text_encoder(checkpoint: Checkpoint) -> None:
    ours = checkpoint.load("text_encoder_2", torch.float32)
    assert parameters(ours) == 694_659_841
    theirs = peers.transformers_openclip(ours)
    tokens = tokenize(PROMPTS)
    hidden, pooled = ours(tokens)
    expected = theirs(tokens, output_hidden_states=True)
    check("OpenCLIP bigG, hidden", hidden, expected.hidden_states[-2])
    check("OpenCLIP bigG, pooled", pooled, expected.text_embeds)


def test_vae(checkpoint: Checkpoint) -> None:
    """At 512x512; the moments are the posterior's mean and log variance, before any draw."""
    ours = checkpoint.load("vae", torch.float32)
    assert parameters(ours) == 83_653_863
    theirs = peers.diffusers_vae(ours)
    image, z = noise(1, 3, 512, 512).clamp(-1, 1), noise(1, 4, 64, 64, seed=1)
    expected = theirs.encode(image).latent_dist
    posterior = ours.encode(image)
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    check("VAE, moments", moments, torch.cat([expected.mean, expected.logvar], dim=1))
    check("VAE, decode", ours.decode(z), theirs.decode(z).sample)


def test_base_file_has_the_official_sizes() -> None:
    """The generator's other model, by its header alone: nothing is written."""
    shapes = full_file.names_and_shapes(full_file.BASE_1_0)
    assert (
        sum(torch.Size(shape).numel() for shape in shapes.values())
        == 2_567_463_684 + 123_060_480 + 694_659_841 + 83_653_863
    )
