"""Networks that come when they work and make room for the next: moved to a device, or read from their file.

Forward hooks on the networks themselves do it, so that these stay what they are: their names, hooks of the user's, and
adapters work as without.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.freed_memory import give_freed_memory_back
from sdxl_ref.networks.packing import drop_weights as drop_weights_of
from sdxl_ref.networks.packing import pack
from sdxl_ref.weights.checkpoint import PARTS, Checkpoint, build_empty


class Offload:
    """The one place, on `device`, that several networks share: one is there at a time, the one that worked last.

    `arrivals` are the names of those that came, in order. Threads take turns: `turn` is held while a network works.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.arrivals: list[str] = []
        self.turn = threading.RLock()
        self.packs = False  # whether networks that are read are packed then
        self._present: nn.Module | None = None
        self._leave: Callable[[], Any] | None = None

    def move(self, name: str, network: nn.Module) -> None:
        """Keep a network in the CPU's memory; it moves to the device when it works, and back for the next one."""
        network.to("cpu")
        self._watch(name, network, lambda: network.to(self.device), lambda: network.to("cpu"))

    def read(self, checkpoint: Checkpoint, part: str, dtype: torch.dtype) -> nn.Module:
        """A network without weights, on the meta device: they are read when it works, and dropped for the next one.

        `network.to(dtype)` decides in which dtype they are read. Adapters (`network.adapters`, of sdxl_ref.adapters)
        go on again each time; where they change meanwhile, they call `network.drop_weights`.
        """
        network = build_empty(part, checkpoint.config).to(dtype).eval().requires_grad_(False)

        def fill() -> None:
            checkpoint.fill(network, part, next(network.parameters()).dtype, self.device)
            network.requires_grad_(False)
            adapters: Any = getattr(network, "adapters", None)
            if adapters is not None:
                adapters.put_on_again(network)
            if self.packs:
                pack(network, consume=True)
                give_freed_memory_back()

        def drop_weights() -> None:
            with self.turn:
                if self._present is network:
                    self._empty()

        network.drop_weights = drop_weights  # type: ignore[assignment]

        def drop() -> None:
            drop_weights_of(network)
            give_freed_memory_back()

        self._watch(f"{checkpoint.config.kind} {part}", network, fill, drop)
        return network

    def _watch(self, name: str, network: nn.Module, enter: Callable[[], Any], leave: Callable[[], Any]) -> None:
        """Have a network enter before it, or a child of it, runs: an autoencoder has two doors, encode and decode."""

        def arrive(*_: Any) -> None:
            self.turn.acquire()
            if self._present is network:
                return
            self._empty()
            self._leave = leave  # also of what came only in part, where arriving fails
            enter()
            self._present = network
            self.arrivals.append(name)

        for module in (network, *network.children()):
            module.register_forward_pre_hook(arrive, prepend=True)  # before hooks of the user's
            module.register_forward_hook(lambda *_: self.turn.release(), always_call=True)  # also where arriving fails

    def _empty(self) -> None:
        """Make room."""
        if self._leave is not None:
            self._leave()
        self._present = None
        self._leave = None


def model_cpu_offload(pipelines: Sequence[Any], device: torch.device | str) -> None:
    """Have all networks of some pipelines (`unet`, …; `offload`) share one place on a device, each network once.

    A warning, and nothing else, where there is no CUDA. InputError where a pipeline has such a place already.
    """
    if not is_there(pipelines, device):
        return
    offload = Offload(device)
    moved: set[nn.Module] = set()
    for pipeline in pipelines:
        pipeline.offload = offload
        for part in PARTS:
            network = getattr(pipeline, part)
            if network is not None and network not in moved:
                offload.move(part, network)
                moved.add(network)


def is_there(pipelines: Sequence[Any], device: torch.device | str) -> bool:
    """Whether there is a device to come to; a warning where not. InputError where parts come when they work already."""
    if any(pipeline.offload is not None for pipeline in pipelines):
        raise InputError("the parts come when they work already: open the pipeline again for another way")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        warnings.warn(f"there is no {device} device: every part stays where it is", stacklevel=4)
        return False
    return True
