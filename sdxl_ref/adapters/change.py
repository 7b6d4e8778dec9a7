"""What an adapter does to one weight, whichever way its file holds it.

`factors.py` has the usual kind, `kinds/` those that are imported only when a file has them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sdxl_ref.config import InputError

BIAS = ".bias"  # behind a layer's name: what acts on its bias


class Change(ABC):
    """The change of a weight W of the shape (out,in), (out,in,kh,kw), or (n,) for biases and norms."""

    kind: ClassVar[str]  # as an error speaks of it
    forms: ClassVar[Sequence[str]] = ()  # the forms of files that have a place for `tensors`

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the change. A matrix may stand for a kernel: (out,in) for 1x1, (out,in*kh*kw) for others."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the weight at scale 1, as far as it does not depend on the weight; float32."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "Change":
        """The same on a device."""

    def added(self, weight: Tensor, scale: float) -> Tensor:
        """What is added at a scale to a weight, which is in float32 or float64; in the weight's shape."""
        return scale * self.delta().reshape(weight.shape)

    def fits(self, shape: torch.Size) -> bool:
        """Whether it can act on a weight of this shape: a matrix and a 1x1 kernel are the same thing."""
        if len(self.shape) < 2 or len(shape) < 2:
            return self.shape == shape
        out, width, *kernel = self.shape
        if all(side == 1 for side in kernel):
            return (out, width) == (shape[0], math.prod(shape[1:]))
        return self.shape == shape

    def tensors(self) -> dict[str, Tensor]:
        """What a file of its forms holds of it, by the ends of the keys."""
        raise InputError(f"{self.kind} has no form of file")

    def rows(self, index: int, count: int) -> "Change":
        """The change of one of so many equal blocks of the matrix's rows."""
        raise InputError(f"{self.kind} on a stacked matrix has no parts for its blocks")
