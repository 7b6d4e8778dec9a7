"""LoKr: the change is a Kronecker product kron(w1, w2), either of them whole or of two factors.

It is scaled by alpha / rank, unless both are whole: then there is no rank, and alpha has no effect. Source: LyCORIS,
Yeh et al. 2023, arXiv:2309.14859, `modules/lokr.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.kind import Kind
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.adapters.tucker import check_same_rank, product
from sdxl_ref.config import InputError


@dataclass(frozen=True)
class Side:
    """w1 or w2: one tensor, or the factors `a` (o,r) and `b` (r,i), with a kernel `t` (r,r,kh,kw): `a` (r,o)."""

    whole: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    t: Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> torch.Size:
        if self.whole is not None:
            return self.whole.shape
        assert self.a is not None
        assert self.b is not None
        if self.t is not None:
            return torch.Size((self.a.shape[1], self.b.shape[1], *self.t.shape[2:]))
        return torch.Size((self.a.shape[0], *self.b.shape[1:]))

    def tensor(self) -> Tensor:
        """In float32: (o,i), or with a kernel (o,i,kh,kw)."""
        if self.whole is not None:
            return self.whole.float()
        assert self.a is not None
        assert self.b is not None
        return product(self.a, self.b, self.t).reshape(self.shape).contiguous()

    def to(self, device: torch.device | str) -> "Side":
        tensors = (self.whole, self.a, self.b, self.t)
        return Side(*(None if tensor is None else tensor.to(device) for tensor in tensors))

    def tensors(self, number: int) -> dict[str, Tensor]:
        ends = {f"w{number}": self.whole, f"w{number}_a": self.a, f"w{number}_b": self.b, f"t{number}": self.t}
        return {f"lokr_{end}": tensor for end, tensor in ends.items() if tensor is not None}


@dataclass(frozen=True)
class KroneckerProduct(Change):
    """The change of one weight as two sides."""

    kind = "LoKr"
    forms = ("kohya", "comfyui")
    first: Side  # (a,b)
    second: Side  # (c,d) or (c,d,kh,kw)
    alpha: float | None  # None: both sides are whole

    @property
    def shape(self) -> torch.Size:
        a, b = self.first.shape
        c, d, *kernel = self.second.shape
        return torch.Size((a * c, b * d, *kernel))

    def delta(self) -> Tensor:
        first = self.first.tensor()
        second = self.second.tensor()
        first = first.reshape(*first.shape, *[1] * (second.ndim - 2))  # (a,b) -> (a,b,1,1) beside a kernel
        change = torch.kron(first, second)  # (ac,bd) or (ac,bd,kh,kw)
        if self.alpha is None:
            return change
        rank = self.first.rank or self.second.rank
        assert rank is not None
        return change * (self.alpha / rank)

    def to(self, device: torch.device | str) -> "KroneckerProduct":
        return KroneckerProduct(self.first.to(device), self.second.to(device), self.alpha)

    def tensors(self) -> dict[str, Tensor]:
        alpha = {} if self.alpha is None else {"alpha": torch.tensor(self.alpha)}
        return self.first.tensors(1) | self.second.tensors(2) | alpha


class LoKr(Kind):
    roles = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    suffixes: ClassVar = {role: [role] for role in roles}

    def read(self, layer: Layer, inner: Change | None) -> dict[str, Change]:
        first = self._side(layer, 1)
        second = self._side(layer, 2)
        if len(first.shape) != 2:
            raise InputError(f"layer {layer.name} makes no LoKr: expected a matrix as its first side")
        rank = first.rank or second.rank
        alpha = None if rank is None else layer.alpha(rank)
        return {layer.name: KroneckerProduct(first, second, alpha)}

    def _side(self, layer: Layer, number: int) -> Side:
        name = f"lokr_w{number}"
        if name in layer.roles:
            whole = layer.checked(name)
            if f"{name}_a" in layer.roles or f"{name}_b" in layer.roles or whole.ndim < 2:
                raise InputError(f"layer {layer.name} makes no LoKr: expected {name} as one matrix or as two factors")
            return Side(whole)
        a, b = layer.need(f"{name}_a", f"{name}_b")
        t = layer.checked(f"lokr_t{number}") if f"lokr_t{number}" in layer.roles else None
        check_same_rank(layer.name, "LoKr", a, b, t)
        return Side(None, a, b, t)


KIND = LoKr()
