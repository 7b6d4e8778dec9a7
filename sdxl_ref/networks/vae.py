"""The autoencoder between pictures and latents (8 times smaller, 4 channels).

Attribute paths are the official checkpoint keys without the prefix `first_stage_model.`.
Source: `Encoder` and `Decoder` in sgm/modules/diffusionmodules/model.py, `AutoencodingEngineLegacy` in
sgm/models/autoencoder.py; Rombach et al. 2022 (arXiv:2112.10752).
Shapes: b batch, c channels, H W picture, h w latent (H/8, W/8 for four levels).
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_ref.config import VAEConfig
from sdxl_ref.networks.layers import Upsample, attention, conv3x3, group_norm
from sdxl_ref.noise import Generator, draw_noise

EPS = 1e-6  # of every GroupNorm


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, EPS)
        self.conv1 = conv3x3(channels, out_channels)
        self.norm2 = group_norm(out_channels, EPS)
        self.conv2 = conv3x3(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all pixels, with 1x1 convolutions as projections."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c h w -> b (h w) c") for project in (self.q, self.k, self.v))
        h = rearrange(attention(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Stride 2; the padding is one pixel on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (b,c,h,w) -> (b,c,h/2,w/2)


def middle(c: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c)))


def resolution(channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    """ResnetBlocks of one resolution; the step to the next, `downsample` or `upsample`, is set behind them."""
    widths = [channels] + [out_channels] * blocks
    return nn.Sequential(OrderedDict(block=nn.Sequential(*(ResnetBlock(a, b) for a, b in pairwise(widths)))))


class Encoder(nn.Module):
    """Pictures (b,3,H,W) -> (b, 2*z_channels, h, w), means and log variances before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.Sequential()
        channels = config.ch
        for i, multiplier in enumerate(config.ch_mult):
            level = resolution(channels, config.ch * multiplier, config.num_res_blocks)
            channels = config.ch * multiplier
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = middle(channels)
        self.norm_out = group_norm(channels, EPS)
        self.conv_out = conv3x3(channels, 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (b,z_channels,h,w) -> pictures (b,3,H,W). `up` is indexed by resolution: the last entry runs first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = conv3x3(config.z_channels, channels)
        self.mid = middle(channels)
        self.up = nn.ModuleList()
        for i, multiplier in reversed(list(enumerate(config.ch_mult))):
            level = resolution(channels, config.ch * multiplier, config.num_res_blocks + 1)
            channels = config.ch * multiplier
            if i > 0:
                level.upsample = Upsample(channels)
            self.up.insert(0, level)
        self.norm_out = group_norm(channels, EPS)
        self.conv_out = conv3x3(channels, config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@dataclass(frozen=True)
class Posterior:
    """The encoder's diagonal Gaussian over latents; `mean` and `logvar` are (b,embed_dim,h,w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: Generator) -> Tensor:
        """One draw; the noise is float32 from `generator` (one, or one per image)."""
        noise = draw_noise(self.mean.shape, generator).to(self.mean)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        return self.mean


class AutoencoderKL(nn.Module):
    """`encode(images)`: (b,3,H,W) in [-1,1] -> `Posterior`; `decode(z)`: (b,4,h,w) -> (b,3,H,W). No scaling inside.

    Overflows in float16; the pipelines keep it in float32 unless asked.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
