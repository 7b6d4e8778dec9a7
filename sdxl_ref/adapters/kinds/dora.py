"""DoRA: the norms of W + change are set to what the adapter learned (Liu et al. 2024, arXiv:2402.09353).

Two libraries write it, and they differ at a scale s other than 1. With V = W + change, m the learned magnitude and |.|
the norm of each row (or, where m is (1,in), of each column):

- LyCORIS, `dora_scale`: V * (1 + s (m / |V| - 1)), whatever kind the change is. Source: `functional/general.py`.
- PEFT, `lora_magnitude_vector`: V * m / |V| with V = W + s * change. Source: `tuners/lora/dora.py`.

At scale 0 an adapter is off and the weight stays W, which neither formula says.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.kind import Kind
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError

EPS = torch.finfo(torch.float32).eps  # LyCORIS adds it to the norm
MAGNITUDE = {"LyCORIS": "dora_scale", "PEFT": "lora_magnitude_vector"}
Library = Literal["LyCORIS", "PEFT"]


@dataclass(frozen=True)
class Magnitude(Change):
    """A change and the norms that the weight has with it: one for each row, or for each column."""

    kind = "DoRA"
    inner: Change
    norms: Tensor  # (n,)
    of_rows: bool
    library: Library

    @property
    def forms(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("peft",) if self.library == "PEFT" else ("kohya", "comfyui")

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    def delta(self) -> Tensor:
        return self.inner.delta()

    def to(self, device: torch.device | str) -> "Magnitude":
        return Magnitude(self.inner.to(device), self.norms.to(device), self.of_rows, self.library)

    def fits(self, shape: torch.Size) -> bool:
        axis = 0 if self.of_rows else 1
        return len(shape) >= 2 and shape[axis] == self.norms.numel() and self.inner.fits(shape)

    def added(self, weight: Tensor, scale: float) -> Tensor:
        if self.library == "PEFT":
            whole = weight + self.inner.added(weight, scale)
            return whole * (self._norms_like(weight) / self._norms_of(whole)) - weight
        whole = weight + self.inner.added(weight, 1.0)
        ratio = self._norms_like(weight) / (self._norms_of(whole) + EPS)
        return whole * (1 + scale * (ratio - 1)) - weight

    def _norms_of(self, weight: Tensor) -> Tensor:
        """(out,in,...) -> (out,1,...), or (1,in,...)."""
        others = [axis for axis in range(weight.ndim) if axis != (0 if self.of_rows else 1)]
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True)

    def _norms_like(self, weight: Tensor) -> Tensor:
        sides = [1] * weight.ndim
        sides[0 if self.of_rows else 1] = -1
        return self.norms.to(weight.dtype).reshape(sides)

    def tensors(self) -> dict[str, Tensor]:
        if self.library == "PEFT":
            assert isinstance(self.inner, Factors)
            is_kernel = self.inner.down.ndim == 4
            norms = self.norms.reshape(1, -1, 1, 1) if is_kernel else self.norms
            return self.inner.in_peft() | {"lora_magnitude_vector": norms}
        sides = [1] * max(len(self.shape), 2)
        sides[0 if self.of_rows else 1] = -1
        return self.inner.tensors() | {"dora_scale": self.norms.reshape(sides)}


class DoRA(Kind):
    wraps = True
    suffixes: ClassVar = {
        "dora_scale": ["dora_scale"],
        "lora_magnitude_vector": ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"],
    }

    def read(self, layer: Layer, inner: Change | None) -> dict[str, Change]:
        if inner is None:
            raise InputError(f"layer {layer.name} has a magnitude and no factors: the file is not whole")
        if all(role in layer.roles for role in self.suffixes):
            raise InputError(f"layer {layer.name} has two magnitudes: expected one of {' and '.join(self.suffixes)}")
        library: Library = "LyCORIS" if "dora_scale" in layer.roles else "PEFT"
        magnitude = layer.checked(MAGNITUDE[library])
        if library == "PEFT" and not isinstance(inner, Factors):
            raise InputError(f"layer {layer.name} is {inner.kind} with PEFT's magnitude, which PEFT does not write")
        sides = [side for side in magnitude.shape if side != 1]
        if len(sides) > 1:
            raise InputError(f"layer {layer.name} has magnitudes of shape {tuple(magnitude.shape)}, expected one side")
        is_one_row = magnitude.ndim > 1 and magnitude.shape[0] == 1 and inner.shape[0] > 1
        of_rows = library == "PEFT" or not is_one_row  # PEFT's of a kernel is (1,out,1,1)
        return {layer.name: Magnitude(inner, magnitude.flatten(), of_rows, library)}


KIND = DoRA()
