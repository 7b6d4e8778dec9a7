"""Networks for inference on a CPU: their weights lie in the order in which its kernels read them.

oneDNN's kernels read the weights of convolutions and linear layers in blocks, whose order depends on the machine. For
plain weights every call reorders them, into new memory. Here that is done once. It moves numbers and changes none:
`unpack` gives the plain weights back to the bit. What a layer returns differs by rounding.

In float32 convolutions stay plain: the kernels that take packed weights sum in one long chain there, and are four to
six times as far from the exact result as the plain ones (1e-6 against 2e-7, 384 to 1536 channels).

Source: the operators that torch.compile puts in place of these layers on a CPU where weights are frozen
(torch/_inductor/fx_passes/mkldnn_fusion.py).
Shapes: b batch, c channels, h w a map's height and width.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.layers import attention
from sdxl_ref.networks.openclip_g import SelfAttention

ops: Any = torch.ops.mkldnn
FIRST = "use sdxl_ref.unpack(network), or pipe.unpack(), first"


class PackedLayer(nn.Module):
    """What packed layers share: a layer keeps its place, its hooks and its bias, and only its weight is put away."""

    plain: ClassVar[type[nn.Module]]
    name: ClassVar[str] = "weight"  # of the parameter that is packed
    packed: Tensor

    def reordered(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise InputError(f"a packed network cannot be trained: {FIRST}")
        return super().train(mode)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network has no state_dict: {FIRST}")

    def _load_from_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network cannot be given other weights: {FIRST}")

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=self.packed.dtype)
        moved = function(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            raise InputError(f"a packed network cannot be moved to {moved.device} and {moved.dtype}: {FIRST}")
        return super()._apply(function, recurse)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            raise InputError(f"the {name} of a packed layer is not to be had: {FIRST}")
        return super().__getattr__(name)


class PackedLinear(PackedLayer, nn.Linear):
    plain = nn.Linear

    def reordered(self, weight: Tensor) -> Tensor:
        return reordered_matrix(weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)


class PackedSelfAttention(PackedLayer, SelfAttention):
    """Of OpenCLIP's tower, whose q, k and v are one matrix. Its `out_proj` is packed as any linear layer."""

    plain = SelfAttention
    name = "in_proj_weight"

    def reordered(self, weight: Tensor) -> Tensor:
        return reordered_matrix(weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = linear(x, self.packed, self.in_proj_bias).chunk(3, dim=-1)  # (b,n,3d) -> 3 x (b,n,d)
        return self.out_proj(attention(q, k, v, self.heads, causal=True))


class PackedConv2d(PackedLayer, nn.Conv2d):
    """What the best order is depends on the size of the map, so the weights are reordered at the first call, and where
    a map of another size wants another order. In the wrong one a call takes up to thirty times as long."""

    plain = nn.Conv2d
    size: tuple[int, ...]  # of the maps that the weights are in order for, (h,w)

    def reordered(self, weight: Tensor) -> Tensor:
        self.size = ()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        check_inference(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if tuple(x.shape[2:]) != self.size:
            self.fit(x)
        where = self.padding, self.stride, self.dilation, self.groups
        return ops._convolution_pointwise(x, self.packed, self.bias, *where, "none", [], "")

    def fit(self, x: Tensor) -> None:
        """Bring the weights into the best order for maps like x (b,c,h,w)."""
        where = tuple(self.padding), self.stride, self.dilation, self.groups, (1, *x.shape[1:])
        wanted = best_order(tuple(self.packed.shape), x.dtype, where)
        if not self.packed.is_mkldnn or order_of(self.packed) != wanted:
            self.packed = ops._reorder_convolution_weight(self.packed.to_dense().contiguous(), *where)
        self.size = tuple(x.shape[2:])


KINDS: tuple[type[PackedLayer], ...] = (PackedLinear, PackedConv2d, PackedSelfAttention)
PACKED: dict[type[nn.Module], type[PackedLayer]] = {kind.plain: kind for kind in KINDS}


def reordered_matrix(weight: Tensor) -> Tensor:
    return ops._reorder_linear_weight(weight, None)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    check_inference(x)
    return ops._linear_pointwise(x, packed, bias, "none", [], "")


@lru_cache(maxsize=1000)
def best_order(shape: tuple[int, ...], dtype: torch.dtype, where: tuple[Any, ...]) -> bytes:
    """The order that oneDNN chooses for weights of a shape, a padding, …, and the shape of a map."""
    return order_of(ops._reorder_convolution_weight(torch.empty(shape, dtype=dtype), *where))


def order_of(packed: Tensor) -> bytes:
    """oneDNN's description of the order in memory."""
    return bytes(ops._get_mkldnn_serialized_md(packed).tolist())


def check_inference(x: Tensor) -> None:
    """InputError where gradients are asked for, which these operators do not have."""
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"a packed network has no gradients: {FIRST}")


def pack(network: nn.Module, consume: bool = False) -> nn.Module:
    """An equivalent network for inference on this CPU, under the same names; for pictures and batches of any size.

    The given network stays as it is, unless it may be consumed: then it is itself what is packed, layer by layer, and
    there are never two copies of the weights. InputError where this machine has no such kernels for it.
    """
    if why := why_not(network):
        raise InputError(f"this network cannot be packed: {why}: use it as it is")
    network = network if consume else copied(network)
    for module in network.modules():
        if is_packable(module):
            pack_layer(module)
    return network


def unpack(network: nn.Module, consume: bool = False) -> nn.Module:
    """The inverse of `pack`: plain weights, equal to the bit to those that were packed."""
    network = network if consume else copied(network)
    for module in network.modules():
        if isinstance(module, PackedLayer):
            unpack_layer(module)
    return network


def is_packable(layer: nn.Module) -> bool:
    if type(layer) not in PACKED:
        return False
    weight = layer.get_parameter(PACKED[type(layer)].name)
    return not (isinstance(layer, nn.Conv2d) and weight.dtype == torch.float32)


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in network.modules())


def why_not(network: nn.Module) -> str:
    """Why a network cannot be packed here, in words; empty where it can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return "this PyTorch has no oneDNN that packs weights"
    devices = {parameter.device.type for parameter in network.parameters()}
    dtypes = {parameter.dtype for parameter in network.parameters()}
    if devices != {"cpu"}:
        return f"expected its parameters on the CPU, found {', '.join(sorted(devices)) or 'none'}"
    for dtype in dtypes - {torch.float32}:
        supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
        if dtype not in supported or not getattr(ops, supported[dtype])():
            return f"this CPU has no kernels for {dtype}"
    return ""


def copied(network: nn.Module) -> nn.Module:
    """A network with parameters of its own, but for those that are about to be replaced by reordered ones."""
    kept: dict[int, Any] = {}
    for module in network.modules():
        if is_packable(module):
            weight = module.get_parameter(PACKED[type(module)].name)
            kept[id(weight)] = weight
        elif isinstance(module, PackedLayer):
            kept[id(module.packed)] = module.packed
    return copy.deepcopy(network, kept)


def pack_layer(layer: nn.Module) -> None:
    """Make a layer a packed one, in place: who holds it, and its hooks, notice nothing."""
    kind = PACKED[type(layer)]
    weight = layer.get_parameter(kind.name).detach()
    delattr(layer, kind.name)
    layer.__class__ = kind
    assert isinstance(layer, PackedLayer)
    layer.packed = layer.reordered(weight.contiguous())


def unpack_layer(layer: PackedLayer) -> None:
    """The inverse of `pack_layer`."""
    name = layer.name
    weight = layer.packed.to_dense().contiguous()
    del layer.packed
    layer.__class__ = layer.plain  # type: ignore[assignment]
    layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def drop_weights(network: nn.Module) -> None:
    """Make all parameters empty, on the meta device, and the layers plain ones: without a copy of what is dropped."""
    for module in network.modules():
        if isinstance(module, PackedLayer):
            module.packed = torch.empty(module.packed.shape, dtype=module.packed.dtype, device="meta")
            unpack_layer(module)
    network.to_empty(device="meta")


@contextmanager
def plain_weights(network: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have the parameters of these names in a network, packed or not, and pack again what was packed."""
    owners = sorted({name.rpartition(".")[0] for name in names})
    layers = [layer for owner in owners if isinstance(layer := network.get_submodule(owner), PackedLayer)]
    for layer in layers:
        unpack_layer(layer)
    try:
        yield
    finally:
        for layer in layers:
            pack_layer(layer)
