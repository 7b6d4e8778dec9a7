"""Low-rank adapters (LoRA) on a model: read a file in any form, find each layer's place, say what fits.

`sdxl_ref.adapters.forms` knows how other tools name layers and factors; a file may mix their names. Sources: Hu et al.
2021, arXiv:2106.09685; LoCon (Yeh et al. 2023, arXiv:2309.14859).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.form import Role
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.places import Place, adapted_parts, places
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.dtypes import is_finite
from sdxl_ref.weights.fitting import by_sides
from sdxl_ref.weights.layouts import PARTS, part_rules
from sdxl_ref.weights.tensor_files import open_tensors, read_metadata

ROLES: dict[str, Role] = {
    suffix: role for form in FORMS.values() for role, suffixes in form.suffixes.items() for suffix in suffixes
}
KEY = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, sorted(ROLES, key=len, reverse=True))) + ")")
ARCHITECTURE = re.compile("stable-diffusion-xl-v1-(base|refiner)/lora")  # ModelSpec's name of what an adapter is for
Changes = Mapping[tuple[str, str], list[tuple[Place, Factors]]]  # (part, official name) -> what acts on it


@dataclass(frozen=True)
class Adapter:
    """Factors by place, with what of the file fits nowhere: `missing` layers, and those `misshapen` for the model."""

    layers: Mapping[Place, Factors]
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(place.part for place in self.layers)
        matched = ", ".join(f"{counts[part]} in {part}" for part in PARTS if counts[part])
        report = f"{len(self.layers)} layers matched ({matched or 'none'})"
        for problem, names in (("not in this model", self.missing), ("of another shape", self.misshapen)):
            if names:
                more = ", …" if len(names) > 3 else ""
                report += f"; {len(names)} {problem}: {', '.join(names[:3])}{more}"
        return report

    @property
    def is_whole(self) -> bool:
        """Whether all of the file fits."""
        return not self.missing and not self.misshapen

    @cached_property
    def changes(self) -> Changes:
        """The layers by the tensor that they act on, which may be several: q, k and v of a stacked matrix."""
        layers_on: dict[tuple[str, str], list[tuple[Place, Factors]]] = {}
        for place, factors in self.layers.items():
            layers_on.setdefault((place.part, place.key), []).append((place, factors))
        return layers_on


def add(weight: Tensor, layers: Iterable[tuple[Place, Factors]], scale: float) -> None:
    """Add to a float32 weight, in place, what layers of an adapter change in it."""
    for place, factors in layers:
        block = place.block(weight)
        block += scale * factors.to(weight.device).delta().reshape(block.shape)


def load(path: str | Path, config: ModelConfig) -> Adapter:
    """Read a file and fit it to a model.

    InputError as `read` and `fit` raise it, and for an adapter that by its metadata (ModelSpec) is for the other model
    of the pair.
    """
    layers = read(path)
    architecture = ARCHITECTURE.fullmatch(read_metadata(Path(path)).get("modelspec.architecture", ""))
    if architecture and architecture[1] != config.kind:
        kinds = f"an SDXL {architecture[1]}, by its metadata: expected one for a {config.kind}"
        raise InputError(f"{path} was made for {kinds}")
    try:
        return fit(layers, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read(path: str | Path) -> dict[str, Factors]:
    """The layers of a file by the names that it gives them. InputError for what is no adapter, or a broken one."""
    path = Path(path)
    with open_tensors(path) as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    layers = by_layer(state, path)
    try:
        return {name: _factors(name, roles, metadata, path) for name, roles in layers.items()}
    except InputError:
        raise
    except Exception as error:  # shapes and metadata of any kind
        raise InputError(f"{path} is a broken adapter: its factors make no LoRA ({error!r})") from error


def by_layer(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[Role, Tensor]]:
    """The tensors of a file by layer and role. InputError a key of no form, or a factor that is there twice."""
    layers: dict[str, dict[Role, Tensor]] = {}
    strange = []
    for key, tensor in state.items():
        match = KEY.fullmatch(plain(key))
        if match is None:
            strange.append(key)
            continue
        name = match[1]
        role = ROLES[match[2]]
        roles = layers.setdefault(name, {})
        if role in roles:
            raise InputError(f"{path} holds the {role} factor of {name} twice, under two names: one is {key}")
        roles[role] = tensor
    if strange or not layers:
        whose = ", ".join(owner for form in FORMS.values() for owner in form.whose)
        keys = ", ".join(strange[:3]) or "no tensors"
        raise InputError(f"{path} is no LoRA in {whose} or official names: found {keys}")
    return layers


def plain(key: str) -> str:
    """A key without what the tools of any form put around the layer's name."""
    for form in FORMS.values():
        key = form.plain(key)
    return key


def _factors(name: str, roles: Mapping[Role, Tensor], metadata: Mapping[str, str], path: Path) -> Factors:
    """The factors of a layer. InputError where they make no LoRA."""
    absent = [role for role in ("down", "up") if role not in roles]
    if absent:
        raise InputError(f"{path}: layer {name} has no {' and no '.join(absent)} factor: the file is not whole")
    down = roles["down"]
    up = roles["up"]
    mid = roles.get("mid")
    rank = down.shape[0]
    if min(down.ndim, up.ndim) < 2 or rank < 1 or up.shape[1] != rank or up[0, 0].numel() != 1:
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise InputError(f"{path}: layer {name} has no common rank of at least 1 ({shapes})")
    for factor in (down, up) if mid is None else (down, up, mid):
        _check_values(factor, name, path)
    alpha = float(roles["alpha"]) if "alpha" in roles else alpha_in(metadata, name, rank)
    is_kernel = mid is None or (mid.ndim == 4 and mid.shape[:2] == (rank, rank))
    if not math.isfinite(alpha) or not is_kernel:
        contents = f"alpha {alpha}" if mid is None else f"alpha {alpha}, a third factor {tuple(mid.shape)}"
        raise InputError(f"{path}: layer {name} makes no LoRA of rank {rank}: found {contents}")
    return Factors(down, up, alpha, mid)


def _check_values(factor: Tensor, name: str, path: Path) -> None:
    if not factor.is_floating_point():
        raise InputError(f"{path}: layer {name} has factors of {factor.dtype}, expected floating point numbers")
    if not is_finite(factor):
        raise InputError(f"{path}: layer {name} holds values that are not finite (NaN or infinite)")


def alpha_in(metadata: Mapping[str, str], name: str, rank: int) -> float:
    """The alpha that a file's metadata give a layer, in whichever form; else the rank."""
    for form in FORMS.values():
        alpha = form.alpha(metadata, name, rank)
        if alpha is not None:
            return alpha
    return float(rank)


def fit(layers: Mapping[str, Factors], config: ModelConfig) -> Adapter:
    """Find each layer's place in a model. InputError where none fits: the adapter is for another model."""
    names, shapes = places_by_name(config)
    placed: dict[Place, Factors] = {}
    missing = []
    misshapen = []
    for name, factors in layers.items():
        place = names.get(name)
        if place is None:
            missing.append(name)
        elif shape_for(shapes[place], factors) != shapes[place]:
            misshapen.append(f"{name} ({by_sides(factors.shape)} for {by_sides(shapes[place])})")
        elif place in placed:
            raise InputError(f"two layers of the adapter act on {place.part}.{place.key}, one of them is {name}")
        else:
            placed[place] = factors
    adapter = Adapter(placed, missing, misshapen)
    if not placed:
        raise InputError(f"the adapter fits nothing of this SDXL {config.kind}: {adapter}")
    return adapter


def places_by_name(config: ModelConfig) -> tuple[dict[str, Place], dict[Place, torch.Size]]:
    """The place of every layer by each name that files of any form know it under; and the shape of each place."""
    place_of: dict[str, Place] = {}
    shapes: dict[Place, torch.Size] = {}
    for part, prefix in adapted_parts(config).items():
        state, network_rules = part_rules(part, config)
        for layer, place in places(part, network_rules).items():
            shapes[place] = place.block(state[place.key]).shape
            for form in FORMS.values():
                place_of |= dict.fromkeys(form.spellings(part, prefix, layer), place)
    return place_of, shapes


def shape_for(target: torch.Size, factors: Factors) -> torch.Size:
    """The shape of a change, with as many axes as its target: a matrix and a 1x1 kernel are the same thing."""
    out, width, *kernel = factors.shape
    if all(side == 1 for side in kernel):
        return torch.Size((out, width, *[1] * (len(target) - 2)))
    return factors.shape
