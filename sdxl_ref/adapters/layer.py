"""One layer of an adapter's file: its tensors by what they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.weights.dtypes import is_finite


@dataclass(frozen=True)
class Layer:
    """Tensors by role: `down`, `up`, `mid`, `alpha`, and those that `kinds/` name.

    `alpha(rank)` is the layer's alpha: from the file's tensors, else from its metadata, else the rank.
    """

    name: str
    roles: Mapping[str, Tensor]
    alpha: Callable[[int], float]

    def need(self, *roles: str) -> list[Tensor]:
        """These tensors. InputError where one is not there, or holds what is no weight."""
        absent = [role for role in roles if role not in self.roles]
        if absent:
            raise InputError(f"layer {self.name} has no {' and no '.join(absent)} factor: the file is not whole")
        return [self.checked(role) for role in roles]

    def checked(self, role: str) -> Tensor:
        """A tensor of finite floating point numbers."""
        tensor = self.roles[role]
        if not tensor.is_floating_point():
            raise InputError(f"layer {self.name} has factors of {tensor.dtype}, expected floating point numbers")
        if not is_finite(tensor):
            raise InputError(f"layer {self.name} holds values that are not finite (NaN or infinite)")
        return tensor

    def scaling(self, rank: int) -> float:
        """alpha / rank."""
        return self.alpha(rank) / rank
