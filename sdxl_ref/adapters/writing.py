"""An adapter as what a file of some form holds: its tensors and its metadata."""

from collections.abc import Mapping

from torch import Tensor

from sdxl_ref.adapters.change import BIAS, Change
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.places import Place, adapted_parts, biases, module_of, places
from sdxl_ref.config import InputError, ModelConfig, unknown
from sdxl_ref.weights.layouts import part_rules


def tensors(adapter: Adapter, config: ModelConfig, form: str) -> dict[str, Tensor]:
    """What a file in a form (a key of `FORMS`) holds. InputError for another form."""
    check_form(form)
    state: dict[str, Tensor] = {}
    for name, change in named(adapter, config, form).items():
        state |= FORMS[form].tensors(name.removesuffix(BIAS), change)
    return state


def metadata(config: ModelConfig) -> dict[str, str]:
    """What a file tells of the model that its adapter is for (ModelSpec)."""
    return {"modelspec.architecture": f"stable-diffusion-xl-v1-{config.kind}/lora", "format": "pt"}


def check_form(form: str) -> None:
    """InputError unless files can be written in a form of this name."""
    if form not in FORMS:
        raise InputError(unknown("form", form, FORMS))


def named(adapter: Adapter, config: ModelConfig, form: str) -> dict[str, Change]:
    """Layers under the names of a form; a bias under its layer's name with `.bias` behind it.

    Blocks of a stacked matrix become one layer in official names, and the reverse: a layer on a stacked matrix becomes
    one for each of its blocks in the others. InputError for a change that cannot.
    """
    names = {part: names_of(part, config, form) for part in adapted_parts(config)}
    layers: dict[str, Change] = {}
    for place, change in adapter.layers.items():
        own_names = names[place.part]
        if place in own_names:
            layers[own_names[place]] = change
        elif place.count > 1:
            [name] = on_the_same_matrix(place, own_names).values()
            whole = among(place, change, name)
            before = layers.get(name)
            layers[name] = before.plus(whole) if isinstance(before, Factors) else whole
        else:
            for block, name in on_the_same_matrix(place, own_names).items():
                layers[name] = change.rows(block.index, block.count)
    return layers


def among(place: Place, change: Change, name: str) -> Factors:
    """The change of a block as one of the whole stacked matrix. InputError where it is no LoRA."""
    if not isinstance(change, Factors):
        raise InputError(f"{name} is {change.kind} on a part of a matrix, which has no name of its own in this form")
    return change.among(place.index, place.count)


def on_the_same_matrix(place: Place, names: Mapping[Place, str]) -> dict[Place, str]:
    return {other: name for other, name in names.items() if other.key == place.key}


def names_of(part: str, config: ModelConfig, form: str) -> dict[Place, str]:
    """Every place of a part that a form (a key of `FORMS`) has a name for, and the name that is written."""
    _, network_rules = part_rules(part, config)
    prefix = adapted_parts(config)[part]
    is_official = FORMS[form].layout(part) == "official"
    modules = set()
    for rule in network_rules:
        keys = [rule.official] if is_official else rule.other
        modules |= {module_of(key) for key in keys}
    names: dict[Place, str] = {}
    for end, place_of in (("", places(part, network_rules)), (BIAS, biases(part, network_rules))):
        for layer, place in place_of.items():
            if layer in modules:
                names[place] = FORMS[form].spellings(part, prefix, layer)[0] + end
    return names
