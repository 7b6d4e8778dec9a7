"""Adapters (LoRA and its kin) on a model: read a file in any form, find each layer's place, say what fits.

`sdxl_ref.adapters.forms` knows how other tools name layers and factors; a file may mix their names. Sources: Hu et al.
2021, arXiv:2106.09685; LoCon (Yeh et al. 2023, arXiv:2309.14859).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdxl_ref.adapters.change import BIAS, Change
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.header import check_model
from sdxl_ref.adapters.places import Place, adapted_parts, biases, places
from sdxl_ref.adapters.reading import adapter_file as adapter_file
from sdxl_ref.adapters.reading import embeddings_in
from sdxl_ref.adapters.reading import read as read
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.fitting import by_sides
from sdxl_ref.weights.layouts import PARTS, part_rules
from sdxl_ref.weights.tensor_files import read_metadata

Changes = Mapping[tuple[str, str], list[tuple[Place, Change]]]  # (part, official name) -> what acts on it


@dataclass(frozen=True)
class Adapter:
    """Changes by place, with what of the file fits nowhere: `missing` layers, and those `misshapen` for the model.

    `embeddings` are words of a prompt that stand in the same file, and are not loaded.
    """

    layers: Mapping[Place, Change]
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(place.part for place in self.layers)
        matched = ", ".join(f"{counts[part]} in {part}" for part in PARTS if counts[part])
        report = f"{len(self.layers)} layers matched ({matched or 'none'})"
        problems = {
            "not in this model": self.missing,
            "of another shape": self.misshapen,
            "embeddings, which are not loaded": self.embeddings,
        }
        for problem, names in problems.items():
            if names:
                more = ", …" if len(names) > 3 else ""
                report += f"; {len(names)} {problem}: {', '.join(names[:3])}{more}"
        return report

    @property
    def is_whole(self) -> bool:
        """Whether all of the file fits."""
        return not self.missing and not self.misshapen and not self.embeddings

    @cached_property
    def changes(self) -> Changes:
        """The layers by the tensor that they act on, which may be several: q, k and v of a stacked matrix."""
        layers_on: dict[tuple[str, str], list[tuple[Place, Change]]] = {}
        for place, change in self.layers.items():
            layers_on.setdefault((place.part, place.key), []).append((place, change))
        return layers_on


def add(total: Tensor, original: Tensor, layers: Iterable[tuple[Place, Change]], scale: float) -> None:
    """Add to `total`, in place, what layers of an adapter change in the `original`; both in float32 or float64."""
    for place, change in layers:
        block = place.block(total)
        block += change.to(total.device).added(place.block(original), scale)


def load(path: str | Path, config: ModelConfig) -> Adapter:
    """Read a file, or a folder with one, and fit it to a model.

    InputError as `read` and `fit` raise it, and for an adapter that by its header is for another model.
    """
    layers = read(path)
    file = adapter_file(path)
    try:
        check_model(read_metadata(file), config)
        return replace(fit(layers, config), embeddings=embeddings_in(file))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def fit(layers: Mapping[str, Change], config: ModelConfig) -> Adapter:
    """Find each layer's place in a model. InputError where none fits: the adapter is for another model."""
    names, shapes = places_by_name(config)
    placed: dict[Place, Change] = {}
    missing = []
    misshapen = []
    for name, change in layers.items():
        place = names.get(name)
        if place is None:
            missing.append(name)
        elif not change.fits(shapes[place]):
            misshapen.append(f"{name} ({by_sides(change.shape)} for {by_sides(shapes[place])})")
        elif place in placed:
            raise InputError(f"two layers of the adapter act on {place.part}.{place.key}, one of them is {name}")
        else:
            placed[place] = change
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
        for layer, place in biases(part, network_rules).items():
            shapes[place] = place.block(state[place.key]).shape
            for form in FORMS.values():
                place_of |= {name + BIAS: place for name in form.spellings(part, prefix, layer)}
    return place_of, shapes
