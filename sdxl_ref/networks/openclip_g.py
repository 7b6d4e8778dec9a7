"""The OpenCLIP text tower (ViT-bigG/14 in SDXL) with the two outputs that SDXL reads.

Attribute paths are the official checkpoint keys without `conditioner.embedders.N.model.`, which are open_clip's own.
Source: `TextTransformer` in open_clip's transformer.py; `FrozenOpenCLIPEmbedder2` (layer "penultimate", not legacy)
in sgm/modules/encoders/modules.py.
Shapes: b batch, n = 77 tokens, d width.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_ref.config import TextEncoderConfig
from sdxl_ref.networks.layers import ACTIVATIONS, attention

LOGIT_SCALE = math.log(100.0)  # what a trained CLIP's temperature is clamped to; SDXL does not read it


class SelfAttention(nn.Module):
    """Causal attention with q, k and v stacked in one matrix (names of `nn.MultiheadAttention`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.normal_(torch.empty(3 * width, width), std=width**-0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)  # (b,n,3d) -> 3 x (b,n,d)
        return self.out_proj(attention(q, k, v, self.heads, causal=True))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width)  # eps 1e-5
        self.attn = SelfAttention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width)
        c_fc = nn.Linear(width, 4 * width)
        c_proj = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=ACTIVATIONS[config.activation](), c_proj=c_proj))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenCLIPTextEncoder(nn.Module):
    """tokens (b,77) int64, padded with 0 -> (penultimate hidden (b,77,width), pooled (b,embed_dim)).

    The hidden state is the last block's input, **without** `ln_final`. The pooled vector is `ln_final` of the last
    block's output at the end-of-text token (the highest id, hence the argmax), times `text_projection`.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        positions = torch.empty(config.context_length, config.width)
        self.positional_embedding = nn.Parameter(nn.init.normal_(positions, std=0.01))
        projection = torch.empty(config.width, config.embed_dim)
        self.text_projection = nn.Parameter(nn.init.normal_(projection, std=config.width**-0.5))
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        blocks = nn.Sequential(*(ResidualAttentionBlock(config) for _ in range(config.layers)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(tokens) + self.positional_embedding  # (b,n,d)
        *blocks, last = self.transformer.get_submodule("resblocks").children()
        for block in blocks:
            x = block(x)
        end = tokens.argmax(dim=-1)  # (b,), the first end-of-text token
        at_end = self.ln_final(last(x))[torch.arange(len(tokens), device=tokens.device), end]  # (b,d)
        return x, at_end @ self.text_projection
