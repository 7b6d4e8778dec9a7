"""The low-rank change of one layer as factors, and what can be done with these.

An adapter changes a weight W to W + scale * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685). For a
convolution `down` is one with W's kernel and `up` is 1x1 (LoCon, Yeh et al. 2023, arXiv:2309.14859).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError

HIGHEST_RANK = 4_096  # no matrix of SDXL has a smaller side above it but the largest, and more is of no use


@dataclass(frozen=True)
class Factors(Change):
    """One layer of an adapter: `down` (r,in) or (r,in,kh,kw); `up` (out,r) or (out,r,1,1); maybe `mid` (r,r,kh,kw)."""

    kind = "LoRA"
    forms = ("kohya", "comfyui")  # of `tensors`; every form has a place for the factors themselves
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of the change: (out,in) or (out,in,kh,kw)."""
        kernel = self.down if self.mid is None else self.mid
        return torch.Size((self.up.shape[0], self.down.shape[1], *kernel.shape[2:]))

    def delta(self) -> Tensor:
        """What is added to the weight at scale 1, in float32: (out,in) or (out,in,kh,kw)."""
        up = self.up.float().flatten(1)  # (out,r,1,1) -> (out,r)
        return torch.tensordot(up, self.kernel().float(), dims=1) * (self.alpha / self.rank)

    def kernel(self) -> Tensor:
        """`down`; where there is a `mid`, both folded into one, in float32: (r,in) or (r,in,kh,kw)."""
        if self.mid is None:
            return self.down
        return torch.einsum("rs...,si->ri...", self.mid.float(), self.down.float().flatten(1))

    def scaled_up(self) -> Tensor:
        """`up` times alpha / rank, in float32 where that is not 1: a half would round it."""
        if self.alpha == self.rank:
            return self.up
        return self.up.float() * (self.alpha / self.rank)

    def to(self, device: torch.device | str) -> "Factors":
        """The same on a device."""
        mid = None if self.mid is None else self.mid.to(device)
        return Factors(self.down.to(device), self.up.to(device), self.alpha, mid)

    def tensors(self) -> dict[str, Tensor]:
        """As kohya's tools name them, beside what another kind adds to them."""
        tensors = {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": torch.tensor(self.alpha)}
        return tensors if self.mid is None else tensors | {"lora_mid.weight": self.mid}

    def in_peft(self) -> dict[str, Tensor]:
        """As PEFT names them; it has no alpha in a file's tensors."""
        return {"lora_A.weight": self.kernel().to(self.down.dtype), "lora_B.weight": self.scaled_up()}

    def rows(self, index: int, count: int) -> "Factors":
        """The change of one of so many equal blocks of the matrix's rows."""
        up = self.up.chunk(count)[index].contiguous()
        return Factors(self.down, up, self.alpha, self.mid)

    def among(self, index: int, count: int) -> "Factors":
        """The change of one block as that of a whole matrix of so many: zeros in the rows of the others."""
        up = self.scaled_up()
        whole = up.new_zeros(count * up.shape[0], *up.shape[1:])
        whole.chunk(count)[index].copy_(up)
        return Factors(self.kernel(), whole, float(self.rank))

    def plus(self, other: "Factors") -> "Factors":
        """The sum of two changes as one whose alpha is its rank, as it has to be of both: ranks add up."""
        rank = self.rank + other.rank
        down = torch.cat([self.down, other.down])
        up = torch.cat([self.up, other.up], dim=1)
        return Factors(down, up, float(rank))


def factors_of(layer: Layer) -> Factors:
    """The factors of a file's layer. InputError where they make no LoRA."""
    down, up = layer.need("down", "up")
    rank = down.shape[0]
    if min(down.ndim, up.ndim) < 2 or rank < 1 or up.shape[1] != rank or up[0, 0].numel() != 1:
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise InputError(f"layer {layer.name} has no common rank of at least 1 ({shapes})")
    mid = layer.checked("mid") if "mid" in layer.roles else None
    if mid is not None and (mid.ndim != 4 or mid.shape[:2] != (rank, rank)):
        raise InputError(f"layer {layer.name} makes no LoRA of rank {rank}: found a third factor {tuple(mid.shape)}")
    return Factors(down, up, layer.alpha(rank), mid)
