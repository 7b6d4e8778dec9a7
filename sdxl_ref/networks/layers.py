"""What two or more of the networks share.
Shapes: b batch, n tokens, d width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """The sigmoid approximation of gelu that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}  # gelu: exact (erf)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention: q (b,n,d), k and v (b,m,d) -> (b,n,d); scale 1/sqrt(d/heads)."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h n d -> b n (h d)")


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed numbers (n,) as (n, dim): cosines first, then sines, always computed in float32.

    Frequencies fall geometrically from 1 to 1/max_period. Source: `timestep_embedding` in the official
    sgm/modules/diffusionmodules/util.py. The order of operations below is the official one, so that the float32
    result is the same to the bit.
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[:, None].float() * torch.exp(exponent)[None]  # (n, dim/2)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (n, dim)


def conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)


class GroupNorm(nn.GroupNorm):
    """torch's, which also takes groups of a single value (32 channels of a 1x1 map): their normalised value is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return GroupNorm(32, channels, eps=eps)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, or to the given one (what was odd), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (b,c,h,w) -> (b,c,*size)
