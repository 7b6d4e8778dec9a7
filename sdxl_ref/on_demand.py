"""Networks that come when they work and make room for the next: read from a file, or moved to a device."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sdxl_ref.checkpoint import Checkpoint


class Slot:
    """The one place in memory that several parts share; `loads` tells which came, in order."""

    def __init__(self) -> None:
        self.owner: Guest | None = None
        self.network: nn.Module | None = None
        self.loads: list[str] = []

    def later(self, checkpoint: Checkpoint) -> Callable[..., nn.Module]:
        """In place of `checkpoint.load`: the part is not read yet."""
        return partial(OnDemand, self, checkpoint)

    def get(self, guest: "Guest") -> nn.Module:
        """The guest's network, in place of another one's, which leaves first."""
        if self.owner is not guest or self.network is None:
            if self.owner is not None and self.network is not None:
                self.owner.leave(self.network)
            self.owner = self.network = None
            self.network = guest.enter()
            self.owner = guest
            self.loads.append(guest.name)
        return self.network.to(guest.like)


class Guest(nn.Module, ABC):
    """Stands in for one network of a pipeline; calls, `encode` and `decode` go to it once it is in the slot.

    Its only parameter is empty: it tells, and `.to()` changes, the dtype and the device that the network works in.
    """

    def __init__(self, slot: Slot, name: str, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.slot, self.name = slot, name
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    @abstractmethod
    def enter(self) -> nn.Module:
        """The network, ready to work."""

    @abstractmethod
    def leave(self, network: nn.Module) -> None:
        """Make room."""

    def forward(self, *arguments: Any) -> Any:
        return self.slot.get(self)(*arguments)

    def encode(self, *arguments: Any) -> Any:
        return self.slot.get(self).encode(*arguments)  # type: ignore[operator]

    def decode(self, *arguments: Any) -> Any:
        return self.slot.get(self).decode(*arguments)  # type: ignore[operator]


class OnDemand(Guest):
    """Read from its file when it works, and dropped for the next."""

    def __init__(self, slot: Slot, checkpoint: Checkpoint, part: str, dtype: torch.dtype, device: Any) -> None:
        super().__init__(slot, f"{checkpoint.config.kind} {part}", dtype, device)
        self.checkpoint, self.part = checkpoint, part

    def enter(self) -> nn.Module:
        return self.checkpoint.load(self.part, self.like.dtype, self.like.device)

    def leave(self, network: nn.Module) -> None:
        """The slot's own reference was the last one."""


class Moved(Guest):
    """Kept in the CPU's memory, moved to the device when it works, and back for the next."""

    def __init__(self, slot: Slot, name: str, network: nn.Module, device: Any) -> None:
        super().__init__(slot, name, next(network.parameters()).dtype, device)
        self.kept = [network.to("cpu")]  # in a list: its parameters are not this module's

    def enter(self) -> nn.Module:
        return self.kept[0].to(self.like.device)

    def leave(self, network: nn.Module) -> None:
        network.to("cpu")
