"""What a kind of change is that `kinds/` adds to the usual factors: which tensors it has and what they make."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.layer import Layer


class Kind(ABC):
    """A file in `kinds/` holds one, under the name `KIND`."""

    suffixes: ClassVar[Mapping[str, Sequence[str]]]  # role -> the ends of keys, behind the layer's name
    wraps: ClassVar[bool] = False  # whether it acts on what another kind makes of the same layer

    @abstractmethod
    def read(self, layer: Layer, inner: Change | None) -> dict[str, Change]:
        """Changes by the names of what they act on: the layer's, or with `.bias` behind it.

        `inner` is what another kind makes of the layer. InputError where the tensors make no change.
        """
