"""Make a network a packed one for inference on a CPU (packed_layers.py says what that is), and a plain one again."""

import copy
import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.packed_layers import PACKED, PackedBlock, PackedLayer, PackedPart, ops


def pack(network: nn.Module, consume: bool = False) -> nn.Module:
    """An equivalent network for inference on this CPU, under the same names; for pictures and batches of any size.

    The given network stays as it is, unless it may be consumed: then it is itself what is packed, layer by layer, and
    there are never two copies of the weights. From then on the process keeps the memory that tensors free for others
    (`keep_freed_memory`). InputError where this machine has no such kernels for the network.
    """
    if why := why_not(network):
        raise InputError(f"this network cannot be packed: {why}: use it as it is")
    keep_freed_memory()
    network = network if consume else copied(network)
    for module in network.modules():
        if is_packable(module):
            pack_layer(module)
    return network


def unpack(network: nn.Module, consume: bool = False) -> nn.Module:
    """The inverse of `pack`: plain weights, equal to the bit to those that were packed."""
    network = network if consume else copied(network)
    for module in network.modules():
        if isinstance(module, PackedLayer) and not isinstance(module, PackedPart):
            module.give_back()
    return network


def is_packable(layer: nn.Module) -> bool:
    kind = PACKED.get(type(layer))
    if kind is None:
        return False
    if issubclass(kind, PackedBlock):
        return all(type(part) is nn.Linear for part in kind.layers(layer))  # type: ignore[arg-type]
    if isinstance(layer, nn.Conv2d):
        pads_zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return pads_zeros and layer.weight.dtype != torch.float32
    return True


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in network.modules())


def is_without_weights(network: nn.Module) -> bool:
    """Whether a network is on the meta device: its weights are read when it works."""
    return any(parameter.is_meta for parameter in network.parameters())


def why_not(network: nn.Module) -> str:
    """Why a network cannot be packed here, in words; empty where it can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return "this PyTorch has no oneDNN that packs weights"
    if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
        return "it is compiled"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"expected a CPU with AVX2 or AVX-512, found one with {capability}"
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
        replaced = module.pieces if isinstance(module, PackedLayer) else []
        if is_packable(module):
            replaced = [weight for weight in [module._parameters.get(PACKED[type(module)].name)] if weight is not None]
        kept |= {id(tensor): tensor for tensor in replaced}
    return copy.deepcopy(network, kept)


def pack_layer(layer: nn.Module) -> None:
    """Make a layer a packed one, in place: who holds it, and its hooks, notice nothing."""
    layer.__class__ = PACKED[type(layer)]
    assert isinstance(layer, PackedLayer)
    layer.put_away()


def drop_weights(network: nn.Module) -> None:
    """Make all parameters empty, on the meta device, and the layers plain ones: without a copy of what is dropped."""
    for module in network.modules():
        if isinstance(module, PackedLayer):
            module.pieces = [torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in module.pieces]
    unpack(network, consume=True).to_empty(device="meta")


@contextmanager
def plain_weights(network: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have the parameters of these names in a network, packed or not, and pack again what was packed."""
    owners = {name.rpartition(".")[0] for name in names}
    layers = dict.fromkeys(layer_of(network.get_submodule(owner)) for owner in sorted(owners))
    packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
    for layer in packed:
        layer.give_back()
    try:
        yield
    finally:
        for layer in packed:
            pack_layer(layer)


def layer_of(module: nn.Module) -> nn.Module:
    """What holds the weight of a module: itself, or the block that it is a part of."""
    return module.block[0] if isinstance(module, PackedPart) else module


def keep_freed_memory() -> None:
    """Have glibc make tensors of freed memory, instead of the system's new pages each time.

    Blocks of up to 256 MiB. Other systems, and a glibc before 2.35, stay as they are.
    """
    if sys.platform != "linux":
        return
    mmap_threshold = -3
    trim_threshold = -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(mmap_threshold, 1 << 28):
        mallopt(trim_threshold, 1 << 30)
