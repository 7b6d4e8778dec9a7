"""LoRA in training: two small factors beside each frozen layer (Hu et al. 2021, arXiv:2106.09685).

Layers are hooked where they stand, so that the networks stay what they are; what was learned is an `Adapter`, which
`sdxl_ref.adapters.active` puts on a pipeline and `sdxl_ref.adapters.writing` makes a file of.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdxl_ref.adapters.factors import HIGHEST_RANK, Factors
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.places import Place, matrices, places
from sdxl_ref.adapters.writing import names_of
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.layouts import part_rules
from sdxl_ref.weights.patterns import Patterns

EXAMPLE = "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Choice:
    """Which layers get factors, and of what rank. The change of a weight is `alpha / rank * up @ down`.

    `layers` is a regular expression that is looked for in a layer's official name and in its diffusers' name
    (`unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q`); "attn" is every projection of every attention.
    """

    rank: int = 16
    alpha: float | None = None  # None: the rank
    layers: str = "attn"
    convolutions: bool = False  # all of the UNet's besides
    text_encoders: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= HIGHEST_RANK:
            raise InputError(f"the rank of a LoRA must be from 1 to {HIGHEST_RANK}, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"the alpha of a LoRA must be a finite number above 0, found {self.alpha}")
        self.patterns()

    def patterns(self) -> Patterns:
        """The expression of the layers. InputError where it is none; its search takes bounded time."""
        return Patterns({self.layers: self.layers}, "the layers to train")


class LowRank(nn.Module):
    """The factors of one place: `down` (r,in) or (r,in,kh,kw), drawn; `up` (out,r) or (out,r,1,1), zeros at first."""

    def __init__(self, place: Place, shape: torch.Size, rank: int, alpha: float) -> None:
        super().__init__()
        self.place = place
        self.alpha = alpha
        self.scale = alpha / rank
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, *shape[1:]), a=math.sqrt(5)))  # as PEFT's
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *[1] * (len(shape) - 2)))

    def after(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of a linear layer or a convolution: its output, and the change's."""
        x = inputs[0].to(self.down.dtype)
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(x, self.down, stride=layer.stride, padding=layer.padding)
            change = F.conv2d(low, self.up)
        else:
            change = F.linear(F.linear(x, self.down), self.up)
        return output + self.scale * change.to(output.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """A parametrisation of a weight that no layer owns (q, k and v stacked; the text projection)."""
        change = self.scale * (self.up @ self.down).to(weight.dtype)
        rows = list(weight.chunk(self.place.count))
        rows[self.place.index] = rows[self.place.index] + (change.T if self.place.transposed else change)
        return torch.cat(rows)


def attach(parts: Mapping[str, nn.Module], config: ModelConfig, choice: Choice) -> nn.ModuleDict:
    """Freeze networks and put factors on the chosen layers; returns these by kohya's names. Draws from torch's seed.

    `parts` by name: `unet`, and the text encoders where they learn too. InputError where no layer is chosen.
    """
    for network in parts.values():
        network.requires_grad_(False)
    factors = {name: _put(parts[place.part], place, choice) for name, place in chosen(parts, config, choice).items()}
    return nn.ModuleDict(factors)


def chosen(parts: Mapping[str, nn.Module], config: ModelConfig, choice: Choice) -> dict[str, Place]:
    """The places that are to learn, by kohya's names, from networks that need no memory. InputError where none is."""
    place_of: dict[str, Place] = {}
    for part, network in parts.items():
        if part == "unet" or choice.text_encoders:
            names = names_of(part, config, "kohya")
            place_of |= {names[place]: place for place in _chosen(part, network, config, choice)}
    if not place_of:
        raise InputError(f"no layer has a name with {choice.layers!r} in it: names are such as {EXAMPLE}")
    return place_of


def _chosen(part: str, network: nn.Module, config: ModelConfig, choice: Choice) -> list[Place]:
    """The places of a part that are to learn."""
    names: dict[Place, list[str]] = {}
    _, network_rules = part_rules(part, config)
    for name, place in places(part, network_rules).items():
        names.setdefault(place, []).append(f"{part}.{name}")
    patterns = choice.patterns()
    learning = []
    for place in matrices(config):
        if place.part != part or not _runs(place, config):
            continue
        owner, _, _ = place.key.rpartition(".")
        is_kernel = part == "unet" and isinstance(network.get_submodule(owner), nn.Conv2d)
        is_named = any(patterns.first(name, anywhere=True) is not None for name in names[place])
        if (is_kernel and choice.convolutions) or is_named:
            learning.append(place)
    return learning


def _runs(place: Place, config: ModelConfig) -> bool:
    """Whether SDXL runs a layer: of CLIP-L it does not run the last block."""
    last = config.text_encoders[0].layers - 1
    return place.part != "text_encoder" or not place.key.startswith(f"text_model.encoder.layers.{last}.")


def _put(network: nn.Module, place: Place, choice: Choice) -> LowRank:
    """Factors on one place of a network: in float32 or more, small and exact beside any weight."""
    owner, _, name = place.key.rpartition(".")
    layer: Any = network.get_submodule(owner)
    alpha = float(choice.rank if choice.alpha is None else choice.alpha)
    if isinstance(layer, nn.Linear | nn.Conv2d):
        weight = layer.weight
        low = LowRank(place, weight.shape, choice.rank, alpha)
        layer.register_forward_hook(low.after)
    else:
        weight = _unparametrized(layer, name)
        low = LowRank(place, place.block(weight).shape, choice.rank, alpha)
        parametrize.register_parametrization(layer, name, low)
    return low.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def _unparametrized(layer: Any, name: str) -> Tensor:
    """A weight as it is without the factors that other blocks of its rows already have."""
    if parametrize.is_parametrized(layer, name):
        return layer.parametrizations[name].original
    return layer.get_parameter(name)


def learned(factors: nn.ModuleDict, averaged: Mapping[str, Tensor]) -> Adapter:
    """What was learned; `averaged` are weights by name that stand in for the last ones."""
    values = {}
    for name, parameter in factors.named_parameters():
        values[name] = averaged.get(name, parameter).detach().float().cpu()
    layers = {}
    for name, low in factors.items():
        assert isinstance(low, LowRank)
        layers[low.place] = Factors(values[f"{name}.down"], values[f"{name}.up"], low.alpha)
    return Adapter(layers)
