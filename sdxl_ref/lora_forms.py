"""LoRA files as other tools name them: an adapter -> tensors in kohya's, PEFT's or the official names."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_ref import layouts
from sdxl_ref.checkpoint import prefixes
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.folder import part_rules
from sdxl_ref.layouts import Place
from sdxl_ref.lora import Adapter, Factors

FORMS = ("official", "kohya", "peft")


def tensors(adapter: Adapter, config: ModelConfig, form: str) -> dict[str, Tensor]:
    """What a file in a form holds: "kohya", "peft" (diffusers' names) or "official". InputError for another."""
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    found: dict[str, Tensor] = {}
    for name, factors in named(adapter, config, form).items():
        down, up = factors.kernel().to(factors.down.dtype), factors.up  # only kohya's form has a third factor
        if form == "kohya":
            found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            found[f"{name}.alpha"] = torch.tensor(factors.alpha)
        else:  # these forms have no alpha: it goes into one factor
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": scaled(up, factors)}
    return found


def metadata(config: ModelConfig) -> dict[str, str]:
    """What a file tells of the model that its adapter is for (ModelSpec)."""
    return {"modelspec.architecture": f"stable-diffusion-xl-v1-{config.kind}/lora", "format": "pt"}


def matrices(config: ModelConfig) -> dict[Place, str]:
    """Every matrix and kernel that an adapter can act on, once (q, k and v one by one), and its official key in a
    checkpoint. Embeddings are none: they are looked up, not multiplied with."""
    found: dict[Place, str] = {}
    for part, prefix in prefixes(config).items():
        if part != "vae":
            state, rules = part_rules(part, config)
            for place in layouts.places(part, rules).values():
                stacked = any(place.key == rule.official and len(rule.other) > place.count for rule in rules)
                if state[place.key].ndim >= 2 and not stacked and "embedding" not in place.key:
                    found[place] = prefix + place.key
    return found


def scaled(up: Tensor, factors: Factors) -> Tensor:
    """`up` times the weight of the change, in float32 where that is not 1: a half would round it."""
    return up if factors.alpha == factors.rank else up.float() * (factors.alpha / factors.rank)


def named(adapter: Adapter, config: ModelConfig, form: str) -> dict[str, Factors]:
    """Layers under the names of a form. Blocks of a stacked matrix become one layer in official names, and the
    reverse: a layer on a stacked matrix becomes one for each of its blocks in the others."""
    names = {part: names_of(part, config, form) for part in prefixes(config) if part != "vae"}
    found: dict[str, Factors] = {}
    for place, factors in adapter.layers.items():
        own = names[place.part]
        if place in own:
            found[own[place]] = factors
            continue
        blocks = {each: name for each, name in own.items() if each.key == place.key}
        if form == "official":
            [name] = blocks.values()
            padded = stacked(place, factors)
            found[name] = joined(found[name], padded) if name in found else padded
        else:
            for each, name in blocks.items():
                up = factors.up.chunk(each.count)[each.index].contiguous()
                found[name] = Factors(factors.down, up, factors.alpha, factors.mid)
    return found


def names_of(part: str, config: ModelConfig, form: str) -> dict[Place, str]:
    _, rules = part_rules(part, config)
    prefix = prefixes(config)[part]
    officially = form == "official" or (form == "kohya" and part == "unet")  # as kohya's trainer names the UNet
    modules = {layouts.module_of(key) for rule in rules for key in ((rule.official,) if officially else rule.other)}
    found: dict[Place, str] = {}
    for name, place in layouts.places(part, rules).items():
        if name in modules:
            dotted = prefix + name if form == "official" else f"{part}.{name}"
            found[place] = layouts.KOHYA[part][0] + name.replace(".", "_") if form == "kohya" else dotted
    return found


def stacked(place: Place, factors: Factors) -> Factors:
    """Factors of one block as factors of the whole matrix: zeros in the rows of the others; alpha in `up`."""
    up = scaled(factors.up, factors)
    whole = up.new_zeros(place.count * up.shape[0], *up.shape[1:])
    whole.chunk(place.count)[place.index].copy_(up)
    return Factors(factors.down, whole, float(factors.rank))


def joined(first: Factors, second: Factors) -> Factors:
    """The sum of two changes as one: ranks add up."""
    rank = first.rank + second.rank
    return Factors(torch.cat([first.down, second.down]), torch.cat([first.up, second.up], dim=1), float(rank))
