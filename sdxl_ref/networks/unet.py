"""The UNet of SDXL base and refiner: one class, two configurations.

Attribute paths are the official checkpoint keys without the prefix `model.diffusion_model.`.
Source: `UNetModel` in sgm/modules/diffusionmodules/openaimodel.py and `SpatialTransformer` in
sgm/modules/attention.py of the official code; Podell et al. 2023, "SDXL" (arXiv:2307.01952), section 2.1.
Shapes: b batch, c channels, h w latent height and width, n = h*w tokens, d width of the context.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_ref.config import UNetConfig
from sdxl_ref.networks.layers import Upsample, attention, conv3x3, group_norm, sinusoidal_embedding

EPS = 1e-5  # of the GroupNorms in ResBlocks and `out`; the transformers' is 1e-6


def mlp(width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, and a skip connection."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(channels, EPS), nn.SiLU(), conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        norm = group_norm(out_channels, EPS)
        conv = conv3x3(out_channels, out_channels)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Identity(), conv)  # [2] stands where dropout stood
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (b,c,h,w) -> (b,c_out,h,w)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention of x to `context`, or to itself where there is none; q, k, v have no bias."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))  # key to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        h = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(h)


class GEGLU(nn.Module):
    """Gated gelu (exact): Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (b,n,2d) -> 2 x (b,n,d)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm and added to x."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))  # [1]: dropout
        self.ff = nn.Sequential(OrderedDict(net=net))
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width)  # eps 1e-5
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map. The norm's eps is 1e-6, unlike the ResBlocks'."""

    def __init__(self, channels: int, context_dim: int, head_channels: int, depth: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        heads = channels // head_channels
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)  # (b,n,c)
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Sequential):
    """One entry of the official block lists: hands each layer what it needs besides x."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise eps in a noisy latent, or v: `Prediction` in diffusion/denoiser.py says what to make of it.

    `forward(x, timesteps, context, y)`: x (b,4,h,w), already divided by sqrt(sigma^2 + 1); timesteps (b,) int64 or
    float, in 0..999; context (b,77,context_dim); y (b,adm_in_channels), the pooled text and the embedded sizes.
    Returns eps (b,4,h,w) in the dtype of x, which is that of the weights. Any h and w.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        emb_width = 4 * width
        self.time_embed = mlp(width, emb_width)
        self.label_emb = nn.Sequential(mlp(config.adm_in_channels, emb_width))  # keys label_emb.0.*

        def layers(channels: int, level: int) -> tuple[int, list[nn.Module]]:
            """A ResBlock to the level's width, and its attention where the level has one."""
            out = width * config.channel_mult[level]
            stage: list[nn.Module] = [ResBlock(channels, emb_width, out)]
            if config.has_attention(level):
                stage.append(transformer(out, level))
            return out, stage

        def transformer(channels: int, level: int) -> SpatialTransformer:
            return SpatialTransformer(channels, config.context_dim, config.num_head_channels, config.depths[level])

        levels = len(config.channel_mult)
        self.input_blocks = nn.ModuleList([Stage(conv3x3(config.in_channels, width))])
        channels = width
        skips = [width]
        for level in range(levels):
            for _ in range(config.num_res_blocks):
                channels, stage = layers(channels, level)
                self.input_blocks.append(Stage(*stage))
                skips.append(channels)
            if level < levels - 1:
                down = conv3x3(channels, channels, stride=2)  # (b,c,h,w) -> (b,c,ceil(h/2),ceil(w/2))
                self.input_blocks.append(Stage(nn.Sequential(OrderedDict(op=down))))
                skips.append(channels)

        middle = ResBlock(channels, emb_width, channels), ResBlock(channels, emb_width, channels)
        self.middle_block = Stage(middle[0], transformer(channels, levels - 1), middle[1])

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(config.num_res_blocks + 1):
                channels, stage = layers(channels + skips.pop(), level)
                if level > 0 and i == config.num_res_blocks:
                    stage.append(Upsample(channels))
                self.output_blocks.append(Stage(*stage))
        self.out = nn.Sequential(group_norm(width, EPS), nn.SiLU(), conv3x3(width, config.out_channels))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(sinusoidal_embedding(timesteps, self.config.model_channels).to(x.dtype))
        emb = emb + self.label_emb(y.to(x.dtype))  # (b, 4 * model_channels)

        h = x
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # (b, c + c_skip, h, w)
            h = block(h, emb, context, (skips[-1].shape[2], skips[-1].shape[3]) if skips else None)
        return self.out(h)
