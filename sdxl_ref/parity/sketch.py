"""A count sketch: 1,024 sums that stand for a tensor of any size (Charikar, Chen & Farach-Colton 2002).

Value i of the tensor, counted along its flat index in row-major order, is added with a sign to one of the sums; sign
and sum come from a hash of i alone, so that any language makes the same:

    z = (i + 1) * 0x9E3779B97F4A7C15            all products and sums modulo 2^64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z =  z ^ (z >> 31)                          (SplitMix64: Steele, Lea & Flood 2014)
    sum  = z & 1023;   sign = -1 where bit 10 of z is set, else +1

Sketches are linear: the norm of the difference of two is that of the difference of the tensors, up to a deviation of
sqrt(2/1024)/2 = 2.2 %. The exact norm of each tensor is kept beside it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SUMS = 1024
CHUNK = 1 << 22  # values hashed at once


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor: `sums` (1024,) float64, and exact figures of its values."""

    sums: Tensor
    shape: tuple[int, ...]
    dtype: str
    norm: float
    mean: float
    deviation: float
    low: float
    high: float

    @property
    def figures(self) -> dict[str, Any]:
        """All but the sums, as JSON takes it."""
        names = ("dtype", "norm", "mean", "deviation", "low", "high")
        return {"shape": list(self.shape)} | {name: getattr(self, name) for name in names}

    @classmethod
    def of_figures(cls, sums: Tensor, figures: dict[str, Any]) -> "Sketch":
        if sums.shape != (SUMS,) or not isinstance(getattr(torch, str(figures["dtype"]), None), torch.dtype):
            raise ValueError(f"expected a sketch of {SUMS} sums, and the dtype of the tensor, found {figures['dtype']}")
        return cls(sums=sums, **figures | {"shape": tuple(figures["shape"])})


def sketch(tensor: Tensor) -> Sketch:
    """The sketch of a tensor of any shape and dtype; summed in float64."""
    values = tensor.detach().flatten().double()  # (n,)
    sums = torch.zeros(SUMS, dtype=torch.float64, device=values.device)
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        index, sign = hashed(start, len(chunk), values.device)
        sums.index_add_(0, index, chunk * sign)
    low, high = values.aminmax() if len(values) else (torch.tensor(0.0), torch.tensor(0.0))
    return Sketch(
        sums.cpu(),
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        float(values.norm()),
        float(values.mean()),
        float(values.std(correction=0)),
        float(low),
        float(high),
    )


def hashed(start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sum (count,) int64 and the sign (count,) of each flat index from `start` on."""
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = z * signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ shifted(z, shift)) * signed(factor)
    z = z ^ shifted(z, 31)
    return z & (SUMS - 1), 1.0 - 2.0 * ((z >> 10) & 1)


def shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in: torch's integers have a sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """An unsigned number of 64 bits as the signed one with the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def distance(a: Sketch, b: Sketch) -> float:
    """An estimate of |a - b|, the Euclidean norm of the difference of the two tensors."""
    return float((a.sums - b.sums).norm())
