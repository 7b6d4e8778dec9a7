"""At full size, in float32: each network against its peer on the same weights."""

from collections.abc import Iterator

import full_file
import peers
import pytest
import torch
from torch import nn

from sdxl_ref.config import BASE_1_0, REFINER_1_0, ModelConfig
from sdxl_ref.text.tokenizer import tokenize
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.opening import open_checkpoint

BOUND = 2e-6  # relative L2; the two references on the same weights are 0.7e-6 to 1.7e-6 apart
KINDS = ["refiner", "base"]
PROMPTS = ["a cup of coffee on a wooden table, steam in the morning light", ""]

pytestmark = pytest.mark.full


def checkpoint(config: ModelConfig) -> Checkpoint:
    """The generated file, opened strictly: every key there, in its shape, and no other."""
    found = open_checkpoint(full_file.full_file(config))
    assert found.config == config
    return found


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize(("config", "size"), [(REFINER_1_0, 2_259_526_660), (BASE_1_0, 2_567_463_684)], ids=KINDS)
def test_unet(config: ModelConfig, size: int) -> None:
    """At 512x512, t = 0, 199 and 999. The peer shares our tensors: one copy of the weights in memory."""
    ours = checkpoint(config).load("unet", torch.float32)
    assert parameters(ours) == size
    theirs = peers.diffusers_unet(ours)
    assert theirs.conv_in.weight.data_ptr() == ours.input_blocks[0][0].weight.data_ptr()
    x, context = noise(1, 4, 64, 64), noise(1, 77, config.unet.context_dim, seed=1)
    y = noise(1, config.unet.adm_in_channels, seed=2)
    for t in (0, 199, 999):
        timesteps = torch.tensor([t])
        expected = peers.call_diffusers_unet(theirs, x, timesteps, context, y)
        check(f"UNet of the {config.kind}, 512x512, t = {t}", ours(x, timesteps, context, y), expected)


@pytest.mark.parametrize("config", [REFINER_1_0, BASE_1_0], ids=KINDS)
def test_openclip(config: ModelConfig) -> None:
    ours = checkpoint(config).load("text_encoder_2", torch.float32)
    assert parameters(ours) == 694_659_841
    theirs = peers.transformers_openclip(ours)
    tokens = tokenize(PROMPTS)
    hidden, pooled = ours(tokens)
    expected = theirs(tokens, output_hidden_states=True)
    check(f"OpenCLIP bigG of the {config.kind}, hidden", hidden, expected.hidden_states[-2])
    check(f"OpenCLIP bigG of the {config.kind}, pooled", pooled, expected.text_embeds)


def test_clip_l() -> None:
    ours = checkpoint(BASE_1_0).load("text_encoder", torch.float32)
    assert parameters(ours) == 123_060_480
    theirs = peers.transformers_clip(ours)
    tokens = tokenize(PROMPTS, pad="eos")
    check("CLIP-L, hidden", ours(tokens), theirs(tokens, output_hidden_states=True).hidden_states[-2])


def test_vae() -> None:
    """At 512x512; the moments are the posterior's mean and log variance, before any draw."""
    ours = checkpoint(REFINER_1_0).load("vae", torch.float32)
    assert parameters(ours) == 83_653_863
    theirs = peers.diffusers_vae(ours)
    image, z = noise(1, 3, 512, 512).clamp(-1, 1), noise(1, 4, 64, 64, seed=1)
    expected = theirs.encode(image).latent_dist
    posterior = ours.encode(image)
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    check("VAE, moments", moments, torch.cat([expected.mean, expected.logvar], dim=1))
    check("VAE, decode", ours.decode(z), theirs.decode(z).sample)
