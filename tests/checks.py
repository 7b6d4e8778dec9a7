"""The parity checks: our networks and pipeline against a peer on the same weights.

Each check builds ours, loads the weights that the peer was built from, and asserts a distance. `tamper` changes ours
after it is built: the tests of planted faults hand in a fault there, and expect the check to fail.

The peers' outputs are computed once, from untouched code, before any fault is planted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pairs
import peers
import torch
from torch import Tensor, nn

from sdxl_ref import pack
from sdxl_ref.config import ModelConfig
from sdxl_ref.networks.clip_l import CLIPTextEncoder
from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder
from sdxl_ref.networks.packing import why_not
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.pipelines import ImageToImagePipeline

Tamper = Callable[[Any], Any]
EXACT = 1e-10  # float64: tells an eps of 1e-5 from 1e-6, which random weights in float32 hide
PIPELINE = 1e-5  # float32, several steps: each adds a rounding error of about 1e-6
FLOAT32 = 5e-6  # one network: what sums in another order leave
CONFIGS = {"refiner": peers.SMALL_REFINER, "base": peers.SMALL_BASE}


def untouched(module: Any) -> None:
    """No fault."""


def ours(cls: type[nn.Module], config: Any, state: dict[str, Tensor], tamper: Tamper) -> Any:
    network = cls(config).to(next(iter(state.values())).dtype)
    network.load_state_dict(state, strict=True)
    network.eval().requires_grad_(False)
    tamper(network)
    return pack(network) if pairs.PACKED and not why_not(network) else network


def close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    distance = peers.distance(ours, theirs)
    assert distance <= bound, f"{what}: relative distance {distance:.2e}, at most {bound:.0e} allowed"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- UNet against diffusers ---------------------------------------------------------------------------------------


@lru_cache
def unet_and_peer(kind: str, dtype: torch.dtype) -> tuple[UNet, Any]:
    unet = peers.small_unet(CONFIGS[kind].unet).to(dtype)
    return unet, peers.diffusers_unet(unet)


@lru_cache
def unet_reference(kind: str, size: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    unet, peer = unet_and_peer(kind, dtype)
    x = normal(2, 4, *size, seed=1, dtype=dtype)
    context = normal(2, 77, unet.config.context_dim, seed=2, dtype=dtype)
    y = normal(2, unet.config.adm_in_channels, seed=3, dtype=dtype)
    t = torch.tensor([199.0, 3.5])
    return unet.state_dict(), (x, t, context, y), peers.call_diffusers_unet(peer, x, t, context, y)


def check_unet(
    kind: str = "refiner",
    size: tuple[int, int] = (12, 20),
    dtype: torch.dtype = torch.float64,
    bound: float = EXACT,
    tamper: Tamper = untouched,
) -> None:
    state, inputs, theirs = unet_reference(kind, size, dtype)
    close(ours(UNet, CONFIGS[kind].unet, state, tamper)(*inputs), theirs, bound, "UNet")


# --- VAE against diffusers ----------------------------------------------------------------------------------------


@lru_cache
def vae_reference(dtype: torch.dtype) -> tuple[Any, ...]:
    vae = peers.small_vae().to(dtype)
    peer = peers.diffusers_vae(vae)
    images = normal(2, 3, 64, 96, seed=1, dtype=dtype).clamp(-1, 1)
    z = normal(2, 4, 8, 12, seed=2, dtype=dtype)
    posterior = peer.encode(images).latent_dist
    return vae.state_dict(), images, z, posterior.mean, posterior.logvar, peer.decode(z).sample


def check_vae(dtype: torch.dtype = torch.float64, bound: float = EXACT, tamper: Tamper = untouched) -> None:
    state, images, z, mean, logvar, decoded = vae_reference(dtype)
    vae = ours(AutoencoderKL, peers.SMALL_REFINER.vae, state, tamper)
    posterior = vae.encode(images)
    close(posterior.mean, mean, bound, "VAE mean")
    close(posterior.logvar, logvar, bound, "VAE logvar")
    close(vae.decode(z), decoded, bound, "VAE decode")


# --- OpenCLIP against open_clip and transformers ------------------------------------------------------------------


@lru_cache
def openclip_reference(dtype: torch.dtype) -> tuple[Any, ...]:
    encoder = peers.small_openclip().to(dtype)
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    words = torch.randint(1, 49000, (3, 75), generator=torch.Generator().manual_seed(0))
    for row, (ids, length) in enumerate(zip(words, (0, 9, 75), strict=True)):
        tokens[row, : length + 2] = torch.tensor([49406, *ids[:length].tolist(), 49407])
    transformers = peers.transformers_openclip(encoder)(tokens, output_hidden_states=True)
    open_clip = peers.open_clip_outputs(peers.open_clip_text(encoder), tokens)
    return encoder.state_dict(), tokens, open_clip, (transformers.hidden_states[-2], transformers.text_embeds)


def check_openclip(
    config: Any = None, dtype: torch.dtype = torch.float64, bound: float = EXACT, tamper: Tamper = untouched
) -> None:
    state, tokens, open_clip, transformers = openclip_reference(dtype)
    encoder = ours(OpenCLIPTextEncoder, config or peers.SMALL_REFINER.text_encoders[0], state, tamper)
    hidden, pooled = encoder(tokens)
    for name, (their_hidden, their_pooled) in {"open_clip": open_clip, "transformers": transformers}.items():
        close(hidden, their_hidden, bound, f"OpenCLIP hidden state against {name}")
        close(pooled, their_pooled, bound, f"OpenCLIP pooled vector against {name}")


# --- CLIP-L against transformers ----------------------------------------------------------------------------------


@lru_cache
def clip_reference(dtype: torch.dtype) -> tuple[Any, ...]:
    encoder = peers.small_clip().to(dtype)
    tokens = torch.full((2, 77), 49407)
    tokens[:, 0] = 49406
    tokens[0, 1:9] = torch.arange(500, 4500, 500)
    hidden = peers.transformers_clip(encoder)(tokens, output_hidden_states=True).hidden_states[-2]
    return encoder.state_dict(), tokens, hidden


def check_clip(dtype: torch.dtype = torch.float64, bound: float = EXACT) -> None:
    state, tokens, hidden = clip_reference(dtype)
    encoder = ours(CLIPTextEncoder, peers.SMALL_BASE.text_encoders[0], state, untouched)
    close(encoder(tokens), hidden, bound, "CLIP-L hidden state")


# --- the whole image-to-image run against diffusers ---------------------------------------------------------------


@lru_cache
def pipeline_reference() -> Tensor:
    return pairs.diffusers_refiner()(**pairs.request(), generator=pairs.seeded(7)).images  # type: ignore[no-any-return]


def check_pipeline(config: ModelConfig = pairs.REFINER, tamper: Tamper = untouched) -> None:
    theirs = pipeline_reference()
    pipeline = ImageToImagePipeline(config, **pairs.shared("refiner"))
    tamper(pipeline)
    latents = pipeline(**pairs.request(), generator=pairs.seeded(7)).images
    close(latents, theirs, PIPELINE, "image-to-image latents")
