"""Make a network a packed one for inference on a CPU (packed_layers.py says what that is), and a plain one again."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.freed_memory import keep_freed_memory
from sdxl_ref.networks.packed_layers import (
    PackedBlock,
    PackedConv2d,
    PackedCrossAttention,
    PackedGEGLU,
    PackedLayer,
    PackedLinear,
    PackedPart,
    PackedSelfAttention,
    ops,
    pads_zeros,
)
from sdxl_ref.networks.packed_module import PackedNetwork, packed_class
from sdxl_ref.networks.packed_vae import PackedAttnBlock, PackedResnetBlock, PackedUpsample

LAYERS = (PackedLinear, PackedConv2d, PackedSelfAttention)
BLOCKS = (PackedGEGLU, PackedCrossAttention, PackedAttnBlock, PackedResnetBlock, PackedUpsample)
PACKED: dict[type[nn.Module], type[PackedLayer]] = {kind.plain: kind for kind in (*LAYERS, *BLOCKS)}


@torch.inference_mode(False)
def pack(network: nn.Module, consume: bool = False) -> nn.Module:
    """An equivalent network for inference on this CPU, under the same names; for pictures and batches of any size.

    The given network stays as it is, unless it may be consumed: then it is itself what is packed, layer by layer, and
    there are never two copies of the weights. From then on the process keeps the memory that tensors free for others
    (`keep_freed_memory`). InputError where this machine has no such kernels for the network.
    """
    if why := why_not(network):
        raise InputError(f"this network cannot be packed: {why}: use it as it is")
    if not consume and hasattr(network, "drop_weights"):
        raise InputError("this network is read when it works, and a copy would not be: use pipe.pack()")
    keep_freed_memory()
    network = network if consume else copied(network)
    for module in network.modules():
        if is_packable(module):
            pack_layer(module)
    if not isinstance(network, PackedLayer | PackedNetwork):
        kind: Any = type(network)
        network.__class__ = packed_class(kind)
    return network


@torch.inference_mode(False)
def unpack(network: nn.Module, consume: bool = False) -> nn.Module:
    """The inverse of `pack`: plain weights, equal to the bit to those that were packed."""
    if isinstance(network, PackedPart):
        raise InputError("this layer is computed together with others: unpack the block that holds it")
    network = network if consume else copied(network)
    if isinstance(network, PackedNetwork):
        network.__class__ = type(network).plain  # type: ignore[attr-defined]
    for module in network.modules():
        if isinstance(module, PackedLayer) and not isinstance(module, PackedPart):
            module.give_back()
    return network


def is_packable(layer: nn.Module) -> bool:
    kind = PACKED.get(type(layer))
    if kind is None:
        return False
    if issubclass(kind, PackedBlock):
        parts = kind.layers(layer)  # type: ignore[arg-type]
        return len(set(parts)) == len(parts) and all(type(part) is nn.Linear and is_packable(part) for part in parts)
    if kind.name and layer._parameters.get(kind.name) is None:
        return False  # other tools compute it from something else
    if isinstance(layer, nn.Conv2d):
        return pads_zeros(layer) and layer.weight.dtype != torch.float32
    return True


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in network.modules())


def is_without_weights(network: nn.Module) -> bool:
    """Whether a network is on the meta device: its weights are read when it works."""
    return any(parameter.is_meta for parameter in network.parameters())


def why_not(network: nn.Module) -> str:
    """Why a network cannot be packed here, in words; empty where it can."""
    devices = {parameter.device.type for parameter in network.parameters()}
    if devices != {"cpu"}:
        return f"expected its parameters on the CPU, found {', '.join(sorted(devices)) or 'none'}"
    if hasattr(network, "_orig_mod") or any(module._compiled_call_impl is not None for module in network.modules()):
        return "it is compiled"
    return why_not_here({parameter.dtype for parameter in network.parameters()})


def why_not_here(dtypes: set[torch.dtype]) -> str:
    """Why this machine cannot pack weights of some dtypes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return "this PyTorch has no oneDNN that packs weights"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"expected a CPU with AVX2 or AVX-512, found one with {capability}"
    for dtype in dtypes - {torch.float32}:
        supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
        if dtype not in supported or not getattr(ops, supported[dtype])():
            return f"this CPU has no kernels for {dtype}, in which it takes far longer than in float32"
    return ""


def copied(network: nn.Module) -> nn.Module:
    """A network with parameters of its own, but for those that are about to be replaced by reordered ones."""
    kept: dict[int, Any] = {}
    for module in network.modules():
        replaced = module.pieces if isinstance(module, PackedLayer) else []
        if is_packable(module):
            replaced = [weight for weight in [module._parameters.get(PACKED[type(module)].name)] if weight is not None]
        kept |= {id(tensor): tensor for tensor in replaced}
    return copy.deepcopy(network, kept)


def pack_layer(layer: nn.Module) -> None:
    """Make a layer a packed one, in place: who holds it, and its hooks, notice nothing."""
    plain = type(layer)
    layer.__class__ = PACKED[plain]
    assert isinstance(layer, PackedLayer)
    try:
        layer.put_away()
    except BaseException:  # Ctrl-C too
        layer.__class__ = plain  # type: ignore[assignment]
        raise


def drop_weights(network: nn.Module) -> None:
    """Make all parameters empty, on the meta device, and the layers plain ones: without a copy of what is dropped."""
    for module in network.modules():
        if isinstance(module, PackedLayer):
            module.pieces = [torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in module.pieces]
    unpack(network, consume=True).to_empty(device="meta")


@contextmanager
def plain_weights(network: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have the parameters of these names in a network, packed or not, and pack again what was packed."""
    blocks = [module for module in network.modules() if isinstance(module, PackedBlock)]
    holders = {part: block for block in blocks for part in block.parts}
    owners = [network.get_submodule(owner) for owner in sorted({name.rpartition(".")[0] for name in names})]
    layers = dict.fromkeys(holders.get(owner, owner) for owner in owners)  # type: ignore[call-overload]
    packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
    for layer in packed:
        layer.give_back()
    try:
        yield
    finally:
        for layer in packed:
            pack_layer(layer)
