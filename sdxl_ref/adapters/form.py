"""What a form of adapter file is: how it names layers and factors. Each form is one file in `forms/`."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.config import InputError

Role = Literal["down", "up", "mid", "alpha"]
Layout = Literal["official", "diffusers"]
Suffixes = Mapping[Role, Sequence[str]]
TEXT_MODEL = "text_model."  # of transformers' CLIPTextModel, which leaves it out since version 5


class Settings(ABC):
    """What the texts of one file, its metadata or a configuration beside it, say of its layers."""

    @abstractmethod
    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha of a layer that has none among its tensors; None: they say nothing."""

    @abstractmethod
    def check(self, layer: str, roles: Collection[str]) -> None:
        """InputError where they ask for what is not done here, or for a tensor that the layer does not have."""


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

    def settings(self, texts: Mapping[str, str]) -> Settings | None:
        """What the texts of a file say in this form; None: nothing. InputError for what makes no sense."""
        return None

    def tensors(self, layer: str, change: Change) -> dict[str, Tensor]:
        """The tensors of a layer under its written name. InputError where the form has no place for such a change."""
        if isinstance(change, Factors):
            return self.factors(layer, change)
        if self.name not in change.forms:
            forms = " or ".join(change.forms)
            raise InputError(f"{layer} is {change.kind}, which the form {self.name} cannot hold: expected {forms}")
        return {f"{layer}.{end}": tensor for end, tensor in change.tensors().items()}

    def factors(self, layer: str, factors: Factors) -> dict[str, Tensor]:
        """The usual factors. Where the form has no alpha, it goes into `up`."""
        has_alpha = "alpha" in self.suffixes
        down = factors.kernel().to(factors.down.dtype)
        up = factors.up if has_alpha else factors.scaled_up()
        tensors = {self.key(layer, "down"): down, self.key(layer, "up"): up}
        if has_alpha:
            tensors[self.key(layer, "alpha")] = torch.tensor(factors.alpha)
        return tensors

    def key(self, layer: str, role: Role) -> str:
        return f"{layer}.{self.suffixes[role][0]}"


def with_and_without_text_model(layer: str) -> list[str]:
    """The names of a text encoder's layer in the versions of transformers."""
    return [layer, layer.removeprefix(TEXT_MODEL)] if layer.startswith(TEXT_MODEL) else [layer]
