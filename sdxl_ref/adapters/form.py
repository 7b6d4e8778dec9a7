"""What a form of adapter file is: how it names layers and factors. Each form is one file in `forms/`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdxl_ref.adapters.factors import Factors

Role = Literal["down", "up", "mid", "alpha"]
Layout = Literal["official", "diffusers"]
Suffixes = Mapping[Role, Sequence[str]]


class Form(ABC):
    """The names of one kind of tool. A file in `forms/` holds one, under the name `FORM`."""

    name: ClassVar[str]  # what it is called on the command line
    whose: ClassVar[Sequence[str]] = ()  # the tools, as an error speaks of their names: "kohya's"
    suffixes: ClassVar[Suffixes]  # the ends of keys, behind the layer's name; the first is written

    @abstractmethod
    def layout(self, part: str) -> Layout:
        """Whose names for the layers of a part (`unet`, `text_encoder`, `text_encoder_2`) are written."""

    @abstractmethod
    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        """The names that such files have for a layer; the first is written.

        `layer` is its name in either layout, `prefix` the part's in an official checkpoint.
        """

    def plain(self, key: str) -> str:
        """A key of such a file without what some tools put around the layer's name."""
        return key

    def alpha(self, metadata: Mapping[str, str], layer: str, rank: int) -> float | None:
        """The alpha that a file's metadata give a layer which has none among its tensors; None: they say nothing."""
        return None

    def tensors(self, layer: str, factors: Factors) -> dict[str, Tensor]:
        """The tensors of a layer under its written name. Where the form has no alpha, it goes into `up`."""
        has_alpha = "alpha" in self.suffixes
        down = factors.kernel().to(factors.down.dtype)
        up = factors.up if has_alpha else factors.scaled_up()
        tensors = {self.key(layer, "down"): down, self.key(layer, "up"): up}
        if has_alpha:
            tensors[self.key(layer, "alpha")] = torch.tensor(factors.alpha)
        return tensors

    def key(self, layer: str, role: Role) -> str:
        return f"{layer}.{self.suffixes[role][0]}"
