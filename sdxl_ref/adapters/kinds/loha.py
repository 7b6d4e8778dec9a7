"""LoHa: the change is the elementwise product of two low-rank matrices, (w1_a w1_b) * (w2_a w2_b) * alpha / rank.

Source: Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, Yeh et al. 2023, arXiv:2309.14859, `modules/loha.py`.
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
class Half:
    """One of the two matrices: `a` (out,r) `b` (r,in), or with a kernel `t` (r,r,kh,kw): `a` (r,out) `b` (r,in)."""

    a: Tensor
    b: Tensor
    t: Tensor | None

    @property
    def shape(self) -> torch.Size:
        if self.t is not None:
            return torch.Size((self.a.shape[1], self.b.shape[1], *self.t.shape[2:]))
        return torch.Size((self.a.shape[0], *self.b.shape[1:]))

    def tensor(self) -> Tensor:
        """In float32."""
        return product(self.a, self.b, self.t).reshape(self.shape)

    def to(self, device: torch.device | str) -> "Half":
        return Half(self.a.to(device), self.b.to(device), None if self.t is None else self.t.to(device))


@dataclass(frozen=True)
class HadamardProduct(Change):
    """The change of one weight as two halves of one rank."""

    kind = "LoHa"
    forms = ("kohya", "comfyui")
    first: Half
    second: Half
    alpha: float

    @property
    def rank(self) -> int:
        return self.first.b.shape[0]

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    def delta(self) -> Tensor:
        return self.first.tensor() * self.second.tensor() * (self.alpha / self.rank)

    def to(self, device: torch.device | str) -> "HadamardProduct":
        return HadamardProduct(self.first.to(device), self.second.to(device), self.alpha)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"alpha": torch.tensor(self.alpha)}
        for number, half in ((1, self.first), (2, self.second)):
            tensors[f"hada_w{number}_a"] = half.a
            tensors[f"hada_w{number}_b"] = half.b
            if half.t is not None:
                tensors[f"hada_t{number}"] = half.t
        return tensors


class LoHa(Kind):
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    suffixes: ClassVar = {role: [role] for role in roles}

    def read(self, layer: Layer, inner: Change | None) -> dict[str, Change]:
        first = self._half(layer, 1)
        second = self._half(layer, 2)
        rank = first.b.shape[0]
        if first.shape != second.shape or second.b.shape[0] != rank:
            raise InputError(f"layer {layer.name} makes no LoHa: its two halves differ in shape")
        return {layer.name: HadamardProduct(first, second, layer.alpha(rank))}

    def _half(self, layer: Layer, number: int) -> Half:
        a, b = layer.need(f"hada_w{number}_a", f"hada_w{number}_b")
        t = layer.checked(f"hada_t{number}") if f"hada_t{number}" in layer.roles else None
        check_same_rank(layer.name, "LoHa", a, b, t)
        return Half(a, b, t)


KIND = LoHa()
