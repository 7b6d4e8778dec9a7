"""The kinds of changes beside the usual factors, one in each file of this folder; imported when a file has one.

A kind is added as a file with a `Kind` named `KIND` in it; nothing else has to know of it.
"""

import pkgutil
from importlib import import_module

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.kind import Kind
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError


def _in_this_folder() -> list[Kind]:
    """Every kind, those that wrap others last; the one place where modules are imported by what is there."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    kinds: list[Kind] = [import_module(f"{__name__}.{name}").KIND for name in names]
    return sorted(kinds, key=lambda kind: kind.wraps)


KINDS = _in_this_folder()
ROLES = {suffix: role for kind in KINDS for role, suffixes in kind.suffixes.items() for suffix in suffixes}


def changes(layer: Layer, factors: Change | None) -> dict[str, Change]:
    """What a layer changes, by the names of what it acts on; `factors` are its usual ones, if it has them."""
    acts = {} if factors is None else {layer.name: factors}
    for kind in KINDS:
        if not kind.suffixes.keys() & layer.roles.keys():
            continue
        for name, change in kind.read(layer, acts.get(layer.name)).items():
            if name in acts and not kind.wraps:
                raise InputError(f"layer {name} is both {acts[name].kind} and {change.kind}: expected one of them")
            acts[name] = change
    return acts
