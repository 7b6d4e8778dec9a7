"""The adapters of one network: which are loaded, which change its weights, and the weights as they were.

They are kept on the network itself, as its plain attribute `adapters`, because pipelines may share a network. Active
adapters change the parameters: W + sum of weight * delta (Hu et al. 2021, arXiv:2106.09685), summed in float32 from the
W that is kept and rounded once, so that no order of calls makes a difference and nothing adds up. A change that depends
on W, DoRA's, is that of the W that is kept, whatever other adapters add.

Of a packed network the parameters that change are unpacked for the change, and packed again.

A network whose weights are read from a file when it works, and dropped afterwards, has none to change in between: it
lies on the meta device, and whoever reads them calls `network.adapters.put_on_again(network)`. Where such a network has
a function `drop_weights`, no W is kept: the weights are dropped, to be read again, when its adapters change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.lora import Adapter, add
from sdxl_ref.adapters.places import Place
from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import is_without_weights, plain_weights
from sdxl_ref.weights.dtypes import is_finite

Layers = list[tuple[Place, Change]]  # that act on one parameter
Changes = dict[str, list[tuple[float, Layers]]]  # what is added to each parameter, with its weight


@dataclass(frozen=True, eq=False)
class Loaded:
    """What of an adapter's file acts on a network."""

    file: str  # its real path
    layers: Mapping[str, Layers]  # by the parameter's name

    @staticmethod
    def of(adapter: Adapter, part: str, file: str) -> "Loaded":
        """The layers for one part of a model."""
        return Loaded(file, {key: layers for (own, key), layers in adapter.changes.items() if own == part})


class Active(NamedTuple):
    """How an adapter counts."""

    weight: float
    turn: int  # adapters are listed in the order in which they were made active


@dataclass
class NetworkAdapters:
    """The state of a network. `active` are some of those `loaded`; `originals` the parameters that are changed now."""

    loaded: Mapping[str, Loaded] = field(default_factory=dict)
    active: Mapping[str, Active] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(network: nn.Module) -> "NetworkAdapters":
        """The adapters of a network, which stay with it from now on."""
        adapters: NetworkAdapters = vars(network).setdefault("adapters", NetworkAdapters())
        return adapters

    def replace(self, network: nn.Module, loaded: Mapping[str, Loaded], active: Mapping[str, Active]) -> None:
        """Have other adapters, and change the network's weights where that makes a difference.

        Where this fails, only some of the weights may have been changed: call it again with what was there before.
        """
        before = self._in_effect()
        self.loaded = loaded
        self.active = active
        if self._in_effect() == before:
            return
        if is_without_weights(network):
            self.originals.clear()
        elif (drop_weights := dropper(network)) is not None:
            self.originals.clear()
            drop_weights()
        else:
            self._change(network, keep=True)

    def put_on_again(self, network: nn.Module) -> None:
        """Change weights that were read anew from their file."""
        self.originals.clear()
        self._change(network, keep=dropper(network) is None)

    def _in_effect(self) -> set[tuple[Loaded, float]]:
        """The adapters that make a difference."""
        return {(self.loaded[name], weight) for name, (weight, _) in self.active.items() if weight != 0}

    def _changes(self) -> Changes:
        """What is added to each parameter, always in the same order: sums in floating point depend on it."""
        changes: Changes = {}
        for name in sorted(self.active):
            weight = self.active[name].weight
            if weight != 0:
                for key, layers in self.loaded[name].layers.items():
                    changes.setdefault(key, []).append((weight, layers))
        return changes

    @torch.no_grad()
    def _change(self, network: nn.Module, keep: bool) -> None:
        """Make the parameters those of the active adapters; `keep` the originals, from which that starts."""
        changes = self._changes()
        with plain_weights(network, {*self.originals, *changes}):
            self._change_plain(network, changes, keep)

    def _change_plain(self, network: nn.Module, changes: Changes, keep: bool) -> None:
        for key in self.originals.keys() - changes.keys():
            parameter = network.get_parameter(key)
            parameter.data = self.originals[key].to(parameter.device, parameter.dtype)
            del self.originals[key]
        for key, added in changes.items():
            parameter = network.get_parameter(key)
            original = self.originals.get(key, parameter.data)
            if keep:
                # before anything is changed: a stop in between loses nothing; in the CPU's memory, as offloading needs
                self.originals[key] = original.cpu()
            parameter.data = changed(key, parameter, original, added)


def changed(key: str, parameter: Tensor, original: Tensor, added: list[tuple[float, Layers]]) -> Tensor:
    """The original with changes added, as the parameter is now: its dtype, device and strides.

    InputError where the dtype cannot hold the sum.
    """
    exact = torch.float64 if original.dtype == torch.float64 else torch.float32
    original = original.to(parameter.device, exact)
    total = original.clone()
    for weight, layers in added:
        add(total, original, layers, weight)
    rounded = torch.empty_like(parameter.data).copy_(total)
    if not is_finite(rounded):
        advice = "use lower weights, or another dtype"
        raise InputError(f"{key} with its adapters would hold values that are not finite in {rounded.dtype}: {advice}")
    return rounded


def dropper(network: nn.Module) -> Callable[[], None] | None:
    """The function of a network that drops its weights, to be read again when it works; None: it keeps them."""
    return getattr(network, "drop_weights", None)
