"""The mistakes that people make in an SDXL, each as a change to one module of ours: what explains a difference.

`MISTAKES` is the table. One more is one more function with `@mistake("what it is", KINDS)`: it is handed a module of
one of these classes and returns what its forward would be with the mistake, or None where it would be no other.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_ref.networks import clip_l, layers, openclip_g, unet, vae

Forward = Callable[..., Any]


class Mistake(NamedTuple):
    text: str
    kinds: tuple[type[nn.Module], ...]
    plant: Callable[[Any], Forward | None]


MISTAKES: list[Mistake] = []
NORMS = (nn.GroupNorm, nn.LayerNorm)
ATTENTIONS = (unet.CrossAttention, openclip_g.SelfAttention, clip_l.CLIPAttention, vae.AttnBlock)


def mistake(text: str, *kinds: type[nn.Module]) -> Callable[[Callable[[Any], Forward | None]], Any]:
    def listed(plant: Callable[[Any], Forward | None]) -> Any:
        MISTAKES.append(Mistake(text, kinds, plant))
        return plant

    return listed


# --- norms --------------------------------------------------------------------------------------------------------


def _with_eps(eps: float) -> Callable[[Any], Forward | None]:
    def plant(norm: Any) -> Forward | None:
        if norm.eps == eps:
            return None
        if isinstance(norm, nn.LayerNorm):
            return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, eps)
        return lambda x: torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps)

    return plant


for _eps in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12, 0.0):
    mistake(f"a norm with eps {_eps:g}", *NORMS)(_with_eps(_eps))


@mistake("a norm without weight and bias", *NORMS)
def _bare_norm(norm: Any) -> Forward:
    if isinstance(norm, nn.LayerNorm):
        return lambda x: F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    return lambda x: torch.group_norm(x, norm.num_groups, None, None, norm.eps)


@mistake("an RMSNorm: no mean taken away", nn.LayerNorm)
def _rms(norm: nn.LayerNorm) -> Forward:
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


@mistake("one group for each channel", nn.GroupNorm)
def _instance_norm(norm: nn.GroupNorm) -> Forward | None:
    if norm.num_groups == norm.num_channels:
        return None
    return lambda x: torch.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)


@mistake("one group for all channels", nn.GroupNorm)
def _one_group(norm: nn.GroupNorm) -> Forward:
    return lambda x: torch.group_norm(x, 1, norm.weight, norm.bias, norm.eps)


# --- activations --------------------------------------------------------------------------------------------------

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu in its tanh approximation": lambda x: F.gelu(x, approximate="tanh"),
    "quick gelu (x * sigmoid(1.702 x))": lambda x: x * torch.sigmoid(1.702 * x),
    "the exact gelu": F.gelu,
    "SiLU": F.silu,
    "ReLU": F.relu,
    "no activation": lambda x: x,
}


def _activation(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Forward]:
    return lambda module: function


def _gate(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Forward]:
    def plant(geglu: unet.GEGLU) -> Forward:
        def forward(x: Tensor) -> Tensor:
            value, gate = geglu.proj(x).chunk(2, dim=-1)
            return value * function(gate)

        return forward

    return plant


for _text, _function in GATES.items():
    mistake(_text, nn.GELU, nn.SiLU, layers.QuickGELU)(_activation(_function))
    mistake(_text, unet.GEGLU)(_gate(_function))


@mistake("the halves of GEGLU swapped: the first one is the gate", unet.GEGLU)
def _swapped_halves(geglu: unet.GEGLU) -> Forward:
    def forward(x: Tensor) -> Tensor:
        gate, value = geglu.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

    return forward


# --- weights ------------------------------------------------------------------------------------------------------


@mistake("its weight transposed", nn.Linear)
def _transposed(linear: nn.Linear) -> Forward | None:
    if linear.in_features != linear.out_features:
        return None
    return lambda x: F.linear(x, linear.weight.T, linear.bias)


@mistake("without its bias", nn.Linear, nn.Conv2d)
def _no_bias(layer: Any) -> Forward | None:
    if layer.bias is None:
        return None
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(x, layer.weight)
    return lambda x: layer._conv_forward(x, layer.weight, None)


@mistake("its kernel turned: height and width exchanged", nn.Conv2d)
def _turned(conv: nn.Conv2d) -> Forward | None:
    if conv.kernel_size[0] == 1:
        return None
    return lambda x: conv._conv_forward(x, conv.weight.transpose(2, 3), conv.bias)


@mistake("its kernel flipped, as a convolution in the mathematical sense", nn.Conv2d)
def _flipped(conv: nn.Conv2d) -> Forward | None:
    if conv.kernel_size[0] == 1:
        return None
    return lambda x: conv._conv_forward(x, conv.weight.flip(2, 3), conv.bias)


@mistake("symmetric padding of one pixel, where the last row and column alone are padded", vae.Downsample)
def _symmetric(down: vae.Downsample) -> Forward:
    return lambda x: down.conv(F.pad(x, (1, 1, 1, 1)))


@mistake("padding of the first row and column, where it is the last ones", vae.Downsample)
def _first_padded(down: vae.Downsample) -> Forward:
    return lambda x: down.conv(F.pad(x, (1, 0, 1, 0)))


@mistake("bilinear upsampling, where it is nearest", layers.Upsample)
def _bilinear(up: layers.Upsample) -> Forward:
    def forward(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return up.conv(F.interpolate(x, size=size, mode="bilinear"))

    return forward


def _narrow(dtype: torch.dtype) -> Callable[[Any], Forward]:
    def plant(layer: Any) -> Forward:
        def forward(x: Tensor) -> Tensor:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            if isinstance(layer, nn.Linear):
                return F.linear(x.to(dtype), layer.weight.to(dtype), bias).to(x)
            return layer._conv_forward(x.to(dtype), layer.weight.to(dtype), bias).to(x)

        return forward

    return plant


for _dtype in (torch.bfloat16, torch.float16):
    mistake(f"computed in {str(_dtype).removeprefix('torch.')}", nn.Linear, nn.Conv2d)(_narrow(_dtype))


# --- attention ----------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, scale: float | None = None) -> Tensor:
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), "b h n d -> b n (h d)")


def _attention(how: Callable[..., Tensor]) -> Callable[[Any], Forward]:
    """`how(q, k, v, heads, causal)` in place of the attention of any of our modules that have one."""

    def plant(module: Any) -> Forward:
        def cross(x: Tensor, context: Tensor | None = None) -> Tensor:
            source = x if context is None else context
            return module.to_out(how(module.to_q(x), module.to_k(source), module.to_v(source), module.heads, False))

        def stacked(x: Tensor) -> Tensor:
            q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
            return module.out_proj(how(q, k, v, module.heads, True))

        def clip(x: Tensor) -> Tensor:
            return module.out_proj(how(module.q_proj(x), module.k_proj(x), module.v_proj(x), module.heads, True))

        def pixels(x: Tensor) -> Tensor:
            h = module.norm(x)
            q, k, v = (rearrange(p(h), "b c h w -> b (h w) c") for p in (module.q, module.k, module.v))
            return x + module.proj_out(rearrange(how(q, k, v, 1, False), "b (h w) c -> b c h w", h=x.shape[2]))

        return dict(zip(ATTENTIONS, (cross, stacked, clip, pixels), strict=True))[_kind(module, ATTENTIONS)]

    return plant


def _kind(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    return next(kind for kind in kinds if isinstance(module, kind))


HOW: dict[str, Callable[..., Tensor]] = {
    "scores that are not divided by sqrt(d)": lambda q, k, v, h, c: attend(q, k, v, h, c, 1.0),
    "scores divided by d, not by its root": lambda q, k, v, h, c: attend(q, k, v, h, c, h / q.shape[-1]),
    "the causal mask missing, or one too much": lambda q, k, v, h, c: attend(q, k, v, h, not c),
    "q and k exchanged": lambda q, k, v, h, c: attend(k, q, v, h, c) if q.shape == k.shape else attend(q, k, v, h, c),
    "a single head": lambda q, k, v, h, c: attend(q, k, v, 1, c),
    "twice as many heads": lambda q, k, v, h, c: attend(q, k, v, 2 * h, c),
    "half as many heads": lambda q, k, v, h, c: attend(q, k, v, max(1, h // 2), c),
    "scores scaled by the root of the whole width": lambda q, k, v, h, c: attend(
        q, k, v, h, c, 1 / math.sqrt(q.shape[-1])
    ),
}
for _text, _how in HOW.items():
    mistake(_text, *ATTENTIONS)(_attention(_how))


# --- what groups others -------------------------------------------------------------------------------------------


@mistake("the skip connection left out", unet.ResBlock)
def _no_skip(block: unet.ResBlock) -> Forward:
    return lambda x, emb: block.out_layers(block.in_layers(x) + block.emb_layers(emb)[:, :, None, None])


@mistake("the time embedding left out", unet.ResBlock)
def _no_time(block: unet.ResBlock) -> Forward:
    return lambda x, emb: block.skip_connection(x) + block.out_layers(block.in_layers(x))


@mistake("x + its transformer left out: no residual", unet.SpatialTransformer)
def _no_residual(transformer: unet.SpatialTransformer) -> Forward:
    def forward(x: Tensor, context: Tensor) -> Tensor:
        tokens = transformer.proj_in(rearrange(transformer.norm(x), "b c h w -> b (h w) c"))
        for block in transformer.transformer_blocks:
            tokens = block(tokens, context)
        return rearrange(transformer.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])

    return forward


@mistake("each block's norm applied to the sum, not before it (post-norm)", unet.TransformerBlock)
def _post_norm(block: unet.TransformerBlock) -> Forward:
    def forward(x: Tensor, context: Tensor) -> Tensor:
        x = block.norm1(x + block.attn1(x))
        x = block.norm2(x + block.attn2(x, context))
        return block.norm3(x + block.ff(x))

    return forward


# --- whole networks -----------------------------------------------------------------------------------------------


@mistake("ln_final on the context", openclip_g.OpenCLIPTextEncoder)
def _normed_context(tower: openclip_g.OpenCLIPTextEncoder) -> Forward:
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden, pooled = type(tower).forward(tower, tokens)
        return F.layer_norm(hidden, tower.ln_final.normalized_shape, *_norm_of(tower, hidden)), pooled

    return forward


def _norm_of(tower: Any, like: Tensor) -> tuple[Tensor, Tensor, float]:
    norm = tower.ln_final
    return norm.weight.to(like), norm.bias.to(like), norm.eps


@mistake("the pooled vector taken at the last position", openclip_g.OpenCLIPTextEncoder)
def _pooled_last(tower: openclip_g.OpenCLIPTextEncoder) -> Forward:
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = tower.token_embedding(tokens) + tower.positional_embedding
        *blocks, last = tower.transformer.get_submodule("resblocks").children()
        for block in blocks:
            x = block(x)
        return x, tower.ln_final(last(x))[:, -1] @ tower.text_projection

    return forward


def _with_sinusoids(change: Callable[[Tensor, int], Tensor]) -> Callable[[Any], Forward]:
    """`change(timesteps, dim)` in place of the sinusoids of the timesteps."""

    def plant(network: unet.UNet) -> Forward:
        def forward(x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
            module: Any = unet  # where the network's forward finds it
            usual = module.sinusoidal_embedding
            module.sinusoidal_embedding = change
            try:
                return type(network).forward(network, x, timesteps, context, y)
            finally:
                module.sinusoidal_embedding = usual

        return forward

    return plant


_usual = layers.sinusoidal_embedding
SINUSOIDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sines before cosines": lambda t, dim: _usual(t, dim).roll(dim // 2, dims=-1),
    "sines and cosines in turns": lambda t, dim: rearrange(_usual(t, dim), "b (two d) -> b (d two)", two=2),
    "frequencies over d/2 - 1, not d/2": lambda t, dim: _embedding(t, dim, dim // 2 - 1),
    "timesteps one too low": lambda t, dim: _usual(t - 1, dim),
    "timesteps one too high": lambda t, dim: _usual(t + 1, dim),
    "timesteps cut to whole numbers": lambda t, dim: _usual(t.floor(), dim),
}


def _embedding(values: Tensor, dim: int, count: int) -> Tensor:
    steps = torch.arange(dim // 2, dtype=torch.float32, device=values.device)
    angles = values[:, None].float() * torch.exp(-math.log(10_000.0) * steps / count)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


for _text, _change in SINUSOIDS.items():
    mistake(_text, unet.UNet)(_with_sinusoids(_change))
