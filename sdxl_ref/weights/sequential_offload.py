"""Weights that come to a device layer by layer, each for its own work alone, and go again.

Forward hooks do it, so that the networks stay what they are. A parameter keeps its identity: only its data are those on
the device meanwhile, a copy that is dropped afterwards. As `cpu_offload` of the accelerate library.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import is_packed
from sdxl_ref.weights.checkpoint import PARTS
from sdxl_ref.weights.offload import Offload, is_there

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which are never called themselves


class SequentialOffload(Offload):
    """What networks share whose layers come one by one. `arrivals` are the names of these, in order."""

    def move(self, name: str, network: nn.Module) -> None:
        """Keep a network in the CPU's memory; the weights of each of its blocks come when it is called."""
        network.to("cpu")
        network.comes_by_blocks = self.device  # type: ignore[assignment]
        for path, block, owners in blocks(network):
            self.watch(f"{name}.{path}".rstrip("."), block, owners)

    def watch(self, name: str, block: nn.Module, owners: Sequence[nn.Module]) -> None:
        """Have the tensors of some modules on the device while a block works, also where it fails."""
        homes: list[tuple[Tensor, Tensor]] = []  # each tensor of the block, and its data in the CPU's memory

        def arrive(*_: Any) -> None:
            self.turn.acquire()
            for tensor in (tensor for owner in owners for tensor in own_tensors(owner)):
                homes.append((tensor, tensor.data))
                tensor.data = self.fetch(tensor.data)
            self.arrivals.append(name)

        def leave(*_: Any) -> None:
            for tensor, data in homes:
                tensor.data = data
            homes.clear()
            self.turn.release()

        block.register_forward_pre_hook(arrive, prepend=True)  # before hooks of the user's
        block.register_forward_hook(leave, always_call=True)

    def fetch(self, data: Tensor) -> Tensor:
        """The data on the device."""
        return data.to(self.device)


def blocks(network: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Each module to watch, its name, and the modules whose tensors come with it; together all of a network's.

    A module of which all children are layers is one block: it may use a layer's weight without a call of the layer.
    """
    children = dict(network.named_children())
    is_block = not isinstance(network, CONTAINERS) and not any(list(child.children()) for child in children.values())
    owners = [network, *children.values()] if is_block else [network]
    if any(own_tensors(owner) for owner in owners):
        yield path, network, owners
    if not is_block:
        for name, child in children.items():
            yield from blocks(child, f"{path}.{name}".lstrip("."))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module itself, without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def sequential_cpu_offload(pipelines: Sequence[Any], device: torch.device | str) -> None:
    """Have the layers of all networks of some pipelines (`unet`, …; `offload`) come to a device one by one.

    A network that comes so already, for another pipeline, stays as it is. A warning, and nothing else, where there is
    no CUDA. InputError where a pipeline has an offload already, and for packed networks.
    """
    networks = {getattr(pipeline, part): part for pipeline in pipelines for part in PARTS}
    networks.pop(None, None)
    if any(is_packed(network) for network in networks):
        raise InputError("packed networks cannot be moved: call pipe.unpack() first")
    if not is_there(pipelines, device):
        return
    offload = SequentialOffload(device)
    for pipeline in pipelines:
        pipeline.offload = offload
    for network, part in networks.items():
        if getattr(network, "comes_by_blocks", None) is None:
            offload.move(part, network)
