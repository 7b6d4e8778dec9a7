"""Adapters on running pipelines: loaded from files under names, made active with weights, taken off again.

`load`, `set`, `active` and `unload` mean what diffusers' `load_lora_weights`, `set_adapters`, `get_active_adapters` and
`unload_lora_weights` mean, with PEFT behind them, but for this: a name that is loaded again is replaced (an error
there); an adapter that a new one displaces is inactive on every network (there it stays active on those that the new
one does not change, as half an adapter); a name can be made active only once.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.on_network import Active, Loaded, NetworkAdapters
from sdxl_ref.adapters.places import adapted_parts
from sdxl_ref.config import InputError, unknown

TURNS = itertools.count()  # of all that is made active, one after the other
Weights = float | Sequence[float | None] | None


class Plan(NamedTuple):
    """What a network is to have."""

    loaded: Mapping[str, Loaded]
    active: Mapping[str, Active]


class Adapters:
    """The adapters of one pipeline, or of the two of an ensemble.

    A pipeline has a `config` and the networks `unet`, `text_encoder` (or None) and `text_encoder_2`. What is loaded and
    active belongs to the networks: pipelines that share one have the same adapters on it, and the last call counts.
    """

    def __init__(self, *pipelines: Any) -> None:
        self.pipelines = pipelines

    def load(self, path: str | Path, name: str | None = None, activate: bool = True) -> list[tuple[Any, Adapter]]:
        """Load a file and make it active at weight 1; returns the pipelines that it is on and what of it fits there.

        With `activate=False` it waits for `set`, and what is active stays so.

        Of the two of an ensemble those get it on which the most of its layers fit: an adapter of a base stays off the
        refiner, although their second text encoder is the same, unless it has layers for that one alone. A network that
        both share is changed for both. Adapters that change the same networks are inactive from now on.

        Without a name it is called as its file, with `_2` and so on behind where another file already is. InputError
        where it fits nothing, and as `lora.read` raises it; then nothing is changed. A warning where it fits in part.
        """
        fitted = self._fit(path)
        file = os.path.realpath(lora.adapter_file(path))
        if name is None:
            name = self._name_for(Path(path).stem, file)
        loaded: dict[nn.Module, Loaded] = {}
        for pipeline, adapter in fitted:
            for part, network in networks_of(pipeline).items():
                own = Loaded.of(adapter, part, file)
                if own.layers:
                    loaded[network] = own
        if not loaded:
            raise InputError(f"{path} has layers only for a text encoder that this pipeline does not have")
        put_on(self._with_new(name, loaded, activate))
        for pipeline, adapter in fitted:
            if not adapter.is_whole:
                message = f"{path} fits this SDXL {pipeline.config.kind} only in part: {adapter}"
                warnings.warn(message, stacklevel=3)
        return fitted

    def set(self, names: str | Sequence[str], weights: Weights = None) -> None:
        """Make these adapters active and no others: each at its weight, all at one number, or at 1.

        InputError for a name that is not loaded or stands there twice, for another number of weights than of names, and
        for a weight that is not finite; then nothing is changed.
        """
        names = [names] if isinstance(names, str) else list(names)
        self._check(names)
        numbers = one_for_each(names, weights)
        active = {name: Active(number, next(TURNS)) for name, number in zip(names, numbers, strict=True)}
        plans = {}
        for network in self._networks():
            loaded = NetworkAdapters.of(network).loaded
            own = {name: active[name] for name in names if name in loaded}
            plans[network] = Plan(loaded, own)
        put_on(plans)

    @property
    def active(self) -> list[str]:
        """The names of the adapters that change the weights now, those at weight 0 too, in the order given to `set`."""
        turns: dict[str, int] = {}
        for network in self._networks():
            for name, active in NetworkAdapters.of(network).active.items():
                turns.setdefault(name, active.turn)
        return sorted(turns, key=turns.__getitem__)

    @property
    def loaded(self) -> list[str]:
        """The names of all adapters that can be made active."""
        return list(self._files())

    def file(self, name: str) -> Path:
        """The file of a loaded adapter; of one that was named as a folder, the one in it."""
        return Path(self._files()[name])

    def unload(self) -> None:
        """Forget all adapters, and give the weights back bit for bit."""
        put_on({network: Plan({}, {}) for network in self._networks()})

    def _networks(self) -> list[nn.Module]:
        """Every network once, although pipelines may share it."""
        networks = [network for pipeline in self.pipelines for network in networks_of(pipeline).values()]
        return list(dict.fromkeys(networks))

    def _files(self) -> dict[str, str]:
        """The files of all that is loaded, by name."""
        files: dict[str, str] = {}
        for network in self._networks():
            files |= {name: loaded.file for name, loaded in NetworkAdapters.of(network).loaded.items()}
        return files

    def _fit(self, path: str | Path) -> list[tuple[Any, Adapter]]:
        """The pipelines that a file is for. InputError, the first pipeline's, where there is none."""
        fitted = []
        errors = []
        for pipeline in self.pipelines:
            try:
                fitted.append((pipeline, lora.load(path, pipeline.config)))
            except InputError as error:
                errors.append(error)
        if not fitted:
            raise errors[0]
        most = max(len(adapter.layers) for _, adapter in fitted)
        return [(pipeline, adapter) for pipeline, adapter in fitted if len(adapter.layers) == most]

    def _name_for(self, stem: str, file: str) -> str:
        """The first name that is free, or this file's already."""
        files = self._files()
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([stem], numbered) if files.get(name, file) == file)

    def _with_new(self, name: str, new: Mapping[nn.Module, Loaded], activate: bool) -> dict[nn.Module, Plan]:
        """What every network has once an adapter has come, active in the place of those that it displaces or not."""
        displaced = {name}
        for network in new if activate else ():
            displaced |= NetworkAdapters.of(network).active.keys()
        turn = next(TURNS)
        plans = {}
        for network in self._networks():
            before = NetworkAdapters.of(network)
            loaded = {other: own for other, own in before.loaded.items() if other != name}
            active = {other: own for other, own in before.active.items() if other not in displaced}
            if network in new:
                loaded[name] = new[network]
                if activate:
                    active[name] = Active(1.0, turn)
            plans[network] = Plan(loaded, active)
        return plans

    def _check(self, names: Iterable[str]) -> None:
        """InputError unless these are names of loaded adapters, each there once."""
        loaded = self.loaded
        seen: set[str] = set()
        for name in names:
            if not loaded:
                raise InputError(f"no adapter is loaded, found {name!r}: load one first")
            if name not in loaded:
                raise InputError(unknown("adapter", name, loaded))
            if name in seen:
                raise InputError(f"the adapter {name!r} stands there twice: name it once, with one weight")
            seen.add(name)


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that adapters act on, by part; what `torch.compile` wraps, not its wrapper."""
    networks = {}
    for part in adapted_parts(pipeline.config):
        network = getattr(pipeline, part)
        if network is not None:
            networks[part] = getattr(network, "_orig_mod", network)
    return networks


def put_on(plans: Mapping[nn.Module, Plan]) -> None:
    """Give networks their adapters: all of them, or, where one fails, none."""
    before = {}
    for network in plans:
        adapters = NetworkAdapters.of(network)
        before[network] = Plan(adapters.loaded, adapters.active)
    try:
        for network, plan in plans.items():
            NetworkAdapters.of(network).replace(network, *plan)
    except BaseException:
        for network, plan in before.items():
            NetworkAdapters.of(network).replace(network, *plan)
        raise


def one_for_each(names: Sequence[str], weights: Weights) -> list[float]:
    """A weight for each name: one number serves all, None is 1. InputError for what is no weight."""
    if weights is None or not isinstance(weights, Sequence):
        weights = [weights] * len(names)
    if len(weights) != len(names):
        raise InputError(f"expected one weight for each of {len(names)} adapters, found {len(weights)}")
    numbers: list[float] = []
    for name, weight in zip(names, weights, strict=True):
        number = 1.0 if weight is None else weight
        if not isinstance(number, Real) or not math.isfinite(number):
            raise InputError(f"the weight of an adapter must be a finite number, found {number!r} for {name!r}")
        numbers.append(float(number))
    return numbers
