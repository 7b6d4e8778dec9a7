"""Legitimate rewrites of our own UNet pass, in float32, bfloat16 and float16: ten with these dtypes themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pairs
import peers
import pytest
import torch
import torch.nn.functional as F
from cases import diagonal
from pairs import seeded
from torch import Tensor, nn

from sdxl_ref import pack, parity
from sdxl_ref.networks import unet
from sdxl_ref.networks.packing import why_not
from sdxl_ref.parity.report import Report

Rewrite = Callable[[Any], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def each(network: nn.Module, kind: type[nn.Module], forward: Callable[[Any], Any]) -> nn.Module:
    """Another forward for all modules of a class."""
    for module in network.modules():
        if isinstance(module, kind):
            module.forward = forward(module)  # type: ignore[method-assign]
    return network


def heads_of(attention: Any, tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (b,n,d) -> (b,heads,n,d/heads)


def attending(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rewrite:
    """`attend(q, k, v)`, each (b,heads,n,d), in place of the fast kernel."""

    def forward(attention: Any) -> Any:
        def run(x: Tensor, context: Tensor | None = None) -> Tensor:
            source = x if context is None else context
            q, k, v = (
                heads_of(attention, t) for t in (attention.to_q(x), attention.to_k(source), attention.to_v(source))
            )
            return attention.to_out(attend(q, k, v).transpose(1, 2).flatten(2))

        return run

    return lambda network: each(network, unet.CrossAttention, forward)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.float().softmax(-1).to(v) @ v


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(7, dim=2)], dim=2)


def fused_qkv(network: Any) -> Any:
    def forward(attention: Any) -> Any:
        def run(x: Tensor, context: Tensor | None = None) -> Tensor:
            if context is None:
                weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
                parts = F.linear(x, weight).chunk(3, -1)
            else:
                parts = attention.to_q(x), attention.to_k(context), attention.to_v(context)
            q, k, v = (heads_of(attention, part) for part in parts)
            return attention.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        return run

    return each(network, unet.CrossAttention, forward)


def group_norm_by_hand(network: Any) -> Any:
    def forward(norm: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            groups = x.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
            mean, var = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
            normed = ((groups - mean) / torch.sqrt(var + norm.eps)).reshape(x.shape)
            return (normed * norm.weight.float()[:, None, None] + norm.bias.float()[:, None, None]).to(x)

        return run

    return each(network, nn.GroupNorm, forward)


def singly(network: Any) -> Any:
    return lambda *inputs: torch.cat([network(*(value[i : i + 1] for value in inputs)) for i in range(len(inputs[0]))])


def compiled(network: Any) -> Any:
    return lambda *inputs: torch.compile(network, backend="aot_eager")(*inputs)


def packed(network: nn.Module) -> nn.Module:
    if why_not(network):
        pytest.skip(f"packing was not tried: {why_not(network)}")
    return pack(network)


REWRITES: dict[str, Rewrite] = {
    "fused q, k, v": fused_qkv,
    "attention by hand": attending(by_hand),
    "attention in blocks": attending(in_blocks),
    "GroupNorm by hand": group_norm_by_hand,
    "channels-last": lambda network: network.to(memory_format=torch.channels_last),
    "packed": packed,
    "two single runs": singly,
    "compiled": compiled,
}


def inputs(seed: int) -> tuple[Tensor, ...]:
    config = pairs.REFINER.unet
    x, context = (
        torch.randn(*shape, generator=seeded(seed)) for shape in ((2, 4, 12, 16), (2, 77, config.context_dim))
    )
    y = torch.randn(2, config.adm_in_channels, generator=seeded(seed + 1))
    return x, torch.tensor([199.0, 199.0]), context, y


def judged(rewrite: Rewrite, dtype: torch.dtype, seed: int = 0) -> Report:
    network = peers.small_unet(pairs.REFINER.unet, seed)
    candidate = rewrite(copy.deepcopy(network).to(dtype))
    return parity.compare(network, candidate, inputs(seed), dtype)


QUICK = [name for name in REWRITES if name != "compiled"]


@pytest.mark.parametrize(("name", "dtype"), diagonal(QUICK, [*DTYPES]))
def test_a_rewrite_agrees(name: str, dtype: str) -> None:
    report = judged(REWRITES[name], DTYPES[dtype])
    assert report.culprits == []


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_agrees_on_other_weights(name: str, dtype: torch.dtype, seed: int) -> None:
    report = judged(REWRITES[name], dtype, seed)
    assert report.culprits == []
