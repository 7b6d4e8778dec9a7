"""What packed networks refuse, and how they are copied: the root and every packed layer alike."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError

FIRST = "use sdxl_ref.unpack(network), or pipe.unpack(), first"


class PackedModule(nn.Module):
    """Nothing that needs plain weights is answered."""

    pieces: Sequence[Tensor] = ()  # packed weights: replaced, never written to

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise InputError(f"a packed network cannot be trained: {FIRST}")
        return super().train(mode)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        for dtype in {tensor.dtype for tensor in (*self.pieces, *self.parameters())}:
            probe = torch.empty(0, dtype=dtype)
            moved = function(probe)
            if (moved.device, moved.dtype) != (probe.device, probe.dtype):
                raise InputError(f"a packed network cannot be moved to {moved.device} and {moved.dtype}: {FIRST}")
        return super()._apply(function, recurse)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo |= {id(piece): piece for piece in self.pieces}
        other = memo[id(self)] = type(self).__new__(type(self))
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(f"a packed network cannot be written to a file: {FIRST}")


class PackedNetwork(PackedModule):
    """The root, beside its own class: so that what is refused has changed nothing before."""

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise InputError(f"a packed network cannot be given other weights: {FIRST}")

    def to_empty(self, **_: Any) -> Any:
        raise InputError(f"a packed network cannot be emptied: {FIRST}")


@lru_cache
def packed_class(plain: Any) -> Any:
    """The class of a packed network whose plain one is this."""
    return type(plain.__name__, (PackedNetwork, plain), {"__module__": plain.__module__, "plain": plain})


def check_inference(*tensors: Tensor | None) -> None:
    """InputError where gradients are asked for, which these operators do not have."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise InputError(f"a packed network has no gradients: run it under torch.no_grad(), or {FIRST}")
