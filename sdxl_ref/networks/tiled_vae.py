"""The autoencoder on large pictures: layer by layer in bands of rows (bands.py), the attention by blocks of queries.

What comes out is the whole picture's up to rounding: each norm has the statistics of the whole map. The memory is that
of the two largest neighbouring maps. Plain and packed networks alike, on any device, without gradients.

Shapes: b batch, c channels, h w a map's height and width, n = h*w tokens; H W the picture's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks import bands
from sdxl_ref.networks.layers import Upsample, attention
from sdxl_ref.networks.packed_layers import is_watched
from sdxl_ref.networks.packed_vae import PackedAttnBlock
from sdxl_ref.networks.vae import AttnBlock, AutoencoderKL, Decoder, Downsample, Encoder, Posterior, ResnetBlock

SCORES = 2**27  # bytes: what a block of queries may take where a kernel keeps all of its scores


@torch.no_grad()
def decode(vae: nn.Module, z: Tensor) -> Tensor:
    """Latents (b,4,h,w) -> pictures (b,3,H,W), as `vae.decode`. InputError unless it is an `AutoencoderKL`."""
    with in_bands(vae) as tiled:
        return tiled.decode(z)


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Posterior:
    """Pictures (b,3,H,W) in [-1,1] -> their posterior, as `vae.encode`. InputError unless it is an `AutoencoderKL`."""
    with in_bands(vae) as tiled:
        return tiled.encode(images)


@contextmanager
def in_bands(vae: nn.Module) -> Iterator[AutoencoderKL]:
    """The network itself, whose blocks work in bands meanwhile; hooks see what they saw before."""
    if not isinstance(vae, AutoencoderKL):
        raise InputError(f"only an AutoencoderKL can be tiled, found {type(vae).__name__}: run it untiled")
    blocks = [block for block in vae.modules() if type(block) in FORWARDS and "forward" not in vars(block)]
    for block in blocks:
        block.forward = partial(FORWARDS[type(block)], block)
    try:
        yield vae
    finally:
        for block in blocks:
            del block.forward


def encoder(network: Encoder, x: Tensor) -> Tensor:
    """`Encoder.forward`; no map stays longer than the next block needs it."""
    h = first(network, x)
    for layer in layers(network.down, network.mid):
        h = layer(h)
    return last(network, h)


def decoder(network: Decoder, z: Tensor) -> Tensor:
    """`Decoder.forward`; no map stays longer than the next block needs it."""
    h = first(network, z)
    for layer in layers(network.mid, *reversed(network.up)):
        h = layer(h)
    return last(network, h)


def layers(*modules: nn.Module) -> Iterator[nn.Module]:
    """The blocks in order. A sequence that somebody watches stays one: its input is there until its end."""
    for module in modules:
        if type(module) is nn.Sequential and not is_watched(module):
            yield from layers(*module)
        else:
            yield module


def first(network: Encoder | Decoder, x: Tensor) -> Tensor:
    conv = network.conv_in
    if is_small(x, conv.out_channels) or not bands.is_conv3x3(conv) or is_watched(conv):
        return conv(x)
    return bands.convolve(x, conv, lambda band: band)


def last(network: Encoder | Decoder, h: Tensor) -> Tensor:
    norm, conv = network.norm_out, network.conv_out
    is_usual = bands.are_norms(norm) and bands.is_conv3x3(conv)
    if is_small(h, h.shape[1]) or not is_usual or is_watched(norm, conv):
        return conv(torch.nn.functional.silu(norm(h)))
    return bands.convolve(h, conv, bands.normalize(h, norm))


def is_small(x: Tensor, channels: int) -> bool:
    """Whether a map of this size (b,channels,h,w) is worked on as a whole."""
    return bands.size_of(x) // x.shape[1] * channels <= bands.LARGE


def attn_block(block: AttnBlock, x: Tensor) -> Tensor:
    """`AttnBlock.forward`, never with all n x n scores at once."""
    b, _, height, width = x.shape
    n = height * width
    if 4 * b * n * n <= bands.LARGE:
        return type(block).forward(block, x)
    h = block.norm(x)
    q, k, v = (rearrange(project(h), "b c h w -> b (h w) c").contiguous() for project in (block.q, block.k, block.v))
    queries = max(1, SCORES // (4 * b * n))
    h = torch.cat([attention(part, k, v, heads=1) for part in q.split(queries, dim=1)], dim=1)  # (b,n,c)
    return x + block.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {  # packed blocks but the attention do so by themselves
    Encoder: encoder,
    Decoder: decoder,
    ResnetBlock: bands.resnet_block,
    Upsample: bands.upsample,
    Downsample: bands.downsample,
    AttnBlock: attn_block,
    PackedAttnBlock: attn_block,
}
