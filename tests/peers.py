"""The peers of the parity tests, built live on our weights: diffusers, transformers and open_clip.

Weights are seeded, never loaded. Names are translated by `sdxl_ref.weights.layouts`, which the tests of that module
check against the peers' own key lists.

Models come in two sizes: SMALL has SDXL's structure, level by level, for what is about the networks; TINY takes a
quarter of the time, for what is about what is done with them.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.networks.clip_l import CLIPTextEncoder
from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.parity.peers import (  # noqa: F401  what tests build besides
    call_diffusers_unet,
    clip_text_config,
    diffusers_unet,
    diffusers_vae,
    load,
    transformers_clip,
    transformers_openclip,
    translate,
    unet2d,
    vae2d,
)
from sdxl_ref.weights.checkpoint import build, prefixes

SMALL_REFINER = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2),
        num_head_channels=32,
        transformer_depth=2,
        context_dim=64,
        adm_in_channels=48 + 5 * 256,
    ),
    text_encoders=(TextEncoderConfig(width=64, heads=4, layers=3, embed_dim=48),),
    vae=VAEConfig(ch=32),
)
SMALL_BASE = replace(
    SMALL_REFINER,
    unet=replace(
        SMALL_REFINER.unet,
        channel_mult=(1, 2, 4),
        transformer_depth=(1, 2, 3),
        context_dim=32 + 64,
        adm_in_channels=48 + 6 * 256,
    ),
    text_encoders=(
        TextEncoderConfig(width=32, heads=2, layers=3, embed_dim=32, activation="quick_gelu"),
        *SMALL_REFINER.text_encoders,
    ),
)
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
TINY_REFINER = replace(
    SMALL_REFINER,
    unet=replace(
        SMALL_REFINER.unet, num_res_blocks=1, channel_mult=(1, 2, 2), attention_resolutions=(2,), transformer_depth=1
    ),
    vae=TINY_VAE,
)
TINY_BASE = replace(
    SMALL_BASE,
    unet=replace(
        SMALL_BASE.unet, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2,), transformer_depth=(1, 2)
    ),
    vae=TINY_VAE,
)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter from one generator: matrices at 1/sqrt(fan-in), norms near 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if name.endswith("logit_scale"):
                continue
            if p.ndim >= 2 and "embedding" not in name:
                fan_in = p.shape[0] if name == "text_projection" else math.prod(p.shape[1:])
                p.copy_(noise / math.sqrt(fan_in))
            elif p.ndim >= 2:
                p.copy_(0.3 * noise)
            else:
                p.copy_(0.05 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def small_unet(config: UNetConfig = SMALL_REFINER.unet, seed: int = 0) -> UNet:
    return randomise(UNet(config), seed)  # type: ignore[return-value]


def small_vae(config: VAEConfig = SMALL_REFINER.vae, seed: int = 0) -> AutoencoderKL:
    return randomise(AutoencoderKL(config), seed)  # type: ignore[return-value]


def small_openclip(config: TextEncoderConfig = SMALL_REFINER.text_encoders[0], seed: int = 0) -> OpenCLIPTextEncoder:
    return randomise(OpenCLIPTextEncoder(config), seed)  # type: ignore[return-value]


def small_clip(config: TextEncoderConfig = SMALL_BASE.text_encoders[0], seed: int = 0) -> CLIPTextEncoder:
    return randomise(CLIPTextEncoder(config), seed)  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _network(part: str, config: ModelConfig, seed: int) -> nn.Module:
    return randomise(build(part, config), seed)


def network(part: str, config: ModelConfig, seed: int = 0) -> Any:
    """One network of a model, the test's own: a copy is made in half the time of drawing it anew."""
    return copy.deepcopy(_network(part, config, seed))


def networks(config: ModelConfig, seed: int = 0) -> dict[str, nn.Module]:
    """Every network of a model, by its part."""
    return {part: network(part, config, seed) for part in prefixes(config)}


def open_clip_text(encoder: OpenCLIPTextEncoder) -> Any:
    """open_clip's own text tower, `attn_mask` and all; reads our names as they stand."""
    from open_clip.transformer import TextTransformer

    c = encoder.config
    peer = TextTransformer(width=c.width, heads=c.heads, layers=c.layers, output_dim=c.embed_dim)
    state = {k: v for k, v in encoder.state_dict().items() if k != "logit_scale"}
    peer = peer.to(next(iter(state.values())).dtype)
    return load(peer, state)


def open_clip_outputs(peer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The two outputs as the official code's `FrozenOpenCLIPEmbedder2` takes them: a hook on the last block's input."""
    seen: list[Tensor] = []
    hook = peer.transformer.resblocks[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["q"]), with_kwargs=True
    )
    pooled = peer(tokens)
    hook.remove()
    return seen[0], pooled


def clip_tokenizer(folder: Path, pad: str) -> Any:
    """transformers' CLIP tokenizer on open_clip's vocabulary; pad "!" (id 0) or "<|endoftext|>"."""
    import open_clip
    from transformers import CLIPTokenizer

    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    vocab = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, in float64."""
    ours = ours.detach().double()
    theirs = theirs.detach().double()
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
