"""Parts of checkpoints that are read when they work: one set of weights in memory at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sdxl_ref.checkpoint import Checkpoint


class Slot:
    """The one place in memory that several parts share; `loads` tells what was read, in order."""

    def __init__(self) -> None:
        self.owner: OnDemand | None = None
        self.network: nn.Module | None = None
        self.loads: list[str] = []

    def later(self, checkpoint: Checkpoint) -> Callable[..., nn.Module]:
        """In place of `checkpoint.load`: the part is not read yet."""
        return partial(OnDemand, self, checkpoint)

    def get(self, part: "OnDemand") -> nn.Module:
        """The part's network, read from its file where another one was in the slot, which is dropped first."""
        if self.owner is not part or self.network is None:
            self.owner = self.network = None
            self.network = part.checkpoint.load(part.part, part.like.dtype, part.like.device)
            self.owner = part
            self.loads.append(f"{part.checkpoint.config.kind} {part.part}")
        return self.network.to(part.like)


class OnDemand(nn.Module):
    """Stands in for one network of a pipeline; calls, `encode` and `decode` go to it once it is in the slot.

    Its only parameter is empty: it tells, and `.to()` changes, the dtype and the device.
    """

    def __init__(self, slot: Slot, checkpoint: Checkpoint, part: str, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.slot, self.checkpoint, self.part = slot, checkpoint, part
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def forward(self, *arguments: Any) -> Any:
        return self.slot.get(self)(*arguments)

    def encode(self, *arguments: Any) -> Any:
        return self.slot.get(self).encode(*arguments)  # type: ignore[operator]

    def decode(self, *arguments: Any) -> Any:
        return self.slot.get(self).decode(*arguments)  # type: ignore[operator]
