"""Whole differences: `.diff` of a weight, `.diff_b` of a bias, `.w_norm` and `.b_norm` of a norm.

An alpha beside them has no effect. Source: LyCORIS' `modules/full.py` and `modules/norms.py`; ComfyUI writes the same.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdxl_ref.adapters.change import BIAS, Change
from sdxl_ref.adapters.kind import Kind
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError


@dataclass(frozen=True)
class Difference(Change):
    """The change itself."""

    kind = "a whole difference"
    forms = ("kohya", "comfyui")
    tensor: Tensor
    role: str  # the end of its key

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def delta(self) -> Tensor:
        return self.tensor.float()

    def to(self, device: torch.device | str) -> "Difference":
        return Difference(self.tensor.to(device), self.role)

    def tensors(self) -> dict[str, Tensor]:
        return {self.role: self.tensor}

    def rows(self, index: int, count: int) -> "Difference":
        return Difference(self.tensor.chunk(count)[index].contiguous(), self.role)


class Full(Kind):
    weights = ("diff", "w_norm")
    biases = ("diff_b", "b_norm")
    suffixes: ClassVar = {role: [role] for role in (*weights, *biases)}

    def read(self, layer: Layer, inner: Change | None) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        for role in (role for role in self.suffixes if role in layer.roles):
            name = layer.name + BIAS if role in self.biases else layer.name
            if name in changes:
                raise InputError(f"layer {layer.name} holds two differences of one tensor: one is {role}")
            changes[name] = Difference(layer.checked(role), role)
        return changes


KIND = Full()
