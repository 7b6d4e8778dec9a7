"""Low-rank adapters (LoRA) on a model: read any of the forms in use, say what fits, apply, scale, remove.

An adapter changes a weight W to W + scale * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685); for a
convolution `down` is one with W's kernel and `up` is 1x1 (LoCon, Yeh et al. 2023, arXiv:2309.14859). It is applied to
the weights themselves, which are kept: removing gives them back bit for bit, and a run costs what it did before.
The names of layers stand in `sdxl_ref.layouts`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdxl_ref import layouts
from sdxl_ref.checkpoint import PICKLES, prefixes, sha256_of
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.folder import is_finite, part_rules
from sdxl_ref.layouts import Place

OLD = "lora_linear_layer.{}.weight"  # diffusers' text encoders before PEFT
ROLES = {
    "down": ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight", OLD.format("down")),
    "up": ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight", OLD.format("up")),
    "mid": ("lora_mid.weight",),
    "alpha": ("alpha",),
}
ROLE_OF = {suffix: role for role, suffixes in ROLES.items() for suffix in suffixes}
LAYER = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, sorted(ROLE_OF, key=len, reverse=True))) + ")")
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")  # diffusers before PEFT


@dataclass(frozen=True)
class Factors:
    """One layer of an adapter: `down` (r,in) or (r,in,kh,kw); `up` (out,r) or (out,r,1,1); maybe `mid` (r,r,kh,kw)."""

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What is added to the weight at scale 1, in float32: (out,in) or (out,in,kh,kw)."""
        up = self.up.float().flatten(1)  # (out,r,1,1) -> (out,r)
        return torch.tensordot(up, self.kernel().float(), dims=1) * (self.alpha / self.rank)

    def kernel(self) -> Tensor:
        """`down` with `mid`, where there is one, folded in, then in float32: (r,in) or (r,in,kh,kw)."""
        if self.mid is None:
            return self.down
        return torch.einsum("rs...,si->ri...", self.mid.float(), self.down.float().flatten(1))


@dataclass(frozen=True)
class Adapter:
    """Factors by place, with what of the file fits nowhere: `missing` layers, and those `misshapen` for the model."""

    layers: Mapping[Place, Factors]
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{sum(place.part == part for place in self.layers)} in {part}" for part in layouts.PARTS]
        matched = ", ".join(part for part in parts if not part.startswith("0 "))
        text = f"{len(self.layers)} layers matched ({matched or 'none'})"
        for what, names in (("not in this model", self.missing), ("of another shape", self.misshapen)):
            if names:
                text += f"; {len(names)} {what}: {', '.join(names[:3])}{', …' * (len(names) > 3)}"
        return text


def read(path: Path) -> dict[str, Factors]:
    """The layers of a file by the names that it gives them. InputError for what is no adapter, or a broken one."""
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path} is a pickle, which can run any code when opened: expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a safetensors file with an adapter, could not read {path}: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in state.items():
        match = LAYER.fullmatch(PROCESSOR.sub(_plain, key))
        if match is None:
            strange.append(key)
        else:
            layer, role = match[1].removeprefix("base_model.model."), ROLE_OF[match[2]]
            if role in found.setdefault(layer, {}):
                raise InputError(f"{path} holds the {role} factor of {layer} twice, under two names: one is {key}")
            found[layer][role] = tensor
    if strange or not found:
        names = ", ".join(strange[:3]) or "no tensors"
        raise InputError(f"{path} is no LoRA in kohya's, PEFT's, diffusers' or official names: found {names}")
    try:
        return {name: _factors(name, roles, metadata, path) for name, roles in found.items()}
    except InputError:
        raise
    except Exception as error:  # shapes and metadata of any kind
        raise InputError(f"{path} is a broken adapter: its factors make no LoRA ({error!r})") from error


def _plain(match: re.Match[str]) -> str:
    return f".{'to_out.0' if match[1] == 'to_out' else match[1]}.lora_{match[2]}.weight"


def _factors(name: str, roles: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Factors:
    absent = [role for role in ("down", "up") if role not in roles]
    if absent:
        raise InputError(f"{path}: layer {name} has no {' and no '.join(absent)} factor: the file is not whole")
    down, up, mid = roles["down"], roles["up"], roles.get("mid")
    rank = down.shape[0]
    if min(down.ndim, up.ndim) < 2 or rank < 1 or up.shape[1] != rank or up[0, 0].numel() != 1:
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise InputError(f"{path}: layer {name} has no common rank of at least 1 ({shapes})")
    for factor in (down, up, *([mid] if mid is not None else [])):
        if not factor.is_floating_point():
            raise InputError(f"{path}: layer {name} has factors of {factor.dtype}, expected floating point numbers")
        if not is_finite(factor):
            raise InputError(f"{path}: layer {name} holds values that are not finite (NaN or infinite)")
    alpha = float(roles["alpha"]) if "alpha" in roles else peft_alpha(metadata, name, rank)
    if not math.isfinite(alpha) or (mid is not None and (mid.ndim != 4 or mid.shape[:2] != (rank, rank))):
        found = f"alpha {alpha}" if mid is None else f"alpha {alpha}, a third factor {tuple(mid.shape)}"
        raise InputError(f"{path}: layer {name} makes no LoRA of rank {rank}: found {found}")
    return Factors(down, up, alpha, mid)


def peft_alpha(metadata: Mapping[str, str], name: str, rank: int) -> float:
    """The alpha that PEFT's configuration gives a layer, where diffusers kept it in the file; else the rank.

    A configuration stands there for each part (`unet.lora_alpha`), and may name layers (`unet.alpha_pattern`).
    """
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    part = name.split(".")[0]

    def given(field: str) -> Any:
        return config.get(f"{part}.{field}", config.get(field))

    alpha = given("lora_alpha")
    for pattern, own in (given("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", name):
            alpha = own
    if alpha is None:
        return float(rank)
    return float(alpha) * (math.sqrt(rank) if given("use_rslora") else 1)  # which divides by the root of the rank


def fit(found: Mapping[str, Factors], config: ModelConfig) -> Adapter:
    """Find each layer's place in a model. InputError where none fits: the adapter is for another model."""
    names: dict[str, Place] = {}
    shapes: dict[Place, torch.Size] = {}
    for part, prefix in prefixes(config).items():
        if part != "vae":
            state, rules = part_rules(part, config)
            own = layouts.adapter_names(part, prefix, rules)
            names |= own
            shapes |= {place: place.block(state[place.key]).shape for place in set(own.values())}
    adapter = Adapter({}, [], [])
    layers: dict[Place, Factors] = {}
    for name, factors in found.items():
        place = names.get(name)
        if place is None:
            adapter.missing.append(name)
        elif _shape(factors, len(shapes[place])) != shapes[place]:
            adapter.misshapen.append(f"{name} ({_x(_shape(factors, 0))} for {_x(shapes[place])})")
        elif place in layers:
            raise InputError(f"two layers of the adapter act on {place.part}.{place.key}, one of them is {name}")
        else:
            layers[place] = factors
    adapter = Adapter(layers, adapter.missing, adapter.misshapen)
    if not layers:
        raise InputError(f"the adapter fits nothing of this SDXL {config.kind}: {adapter}")
    return adapter


def load(path: Path, config: ModelConfig) -> Adapter:
    """`read` and `fit`. InputError too for an adapter that by its metadata (ModelSpec) is for the other of the pair."""
    found = read(path)
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get("modelspec.architecture", "")
    other = re.fullmatch("stable-diffusion-xl-v1-(base|refiner)/lora", told)
    if other and other[1] != config.kind:
        raise InputError(f"{path} was made for an SDXL {other[1]}, by its metadata: expected one for a {config.kind}")
    try:
        return fit(found, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _shape(factors: Factors, ndim: int) -> torch.Size:
    """Of the change; a 1x1 kernel and a matrix are the same thing, and are made to have `ndim` axes."""
    kernel = (factors.down if factors.mid is None else factors.mid).shape[2:]
    shape = (factors.up.shape[0], factors.down.shape[1], *kernel)
    if ndim and all(side == 1 for side in kernel):
        return torch.Size(shape[:2] + (1,) * (ndim - 2))
    return torch.Size(shape)


def _x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


class Applied:
    """Adapters on the networks of a model: the weights that they change, as they were.

    `parts` are the networks by name (`unet`, `text_encoder`, `text_encoder_2`).
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts
        self.kept: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def apply(self, *adapters: tuple[Adapter, float]) -> None:
        """In place of what was applied before: several adapters, each with a scale."""
        self.remove()
        for key in {(place.part, place.key) for adapter, _ in adapters for place in adapter.layers}:
            parameter = self.parts[key[0]].get_parameter(key[1])
            self.kept[key] = parameter.data
            changed = parameter.detach().float().clone()
            for adapter, scale in adapters:
                add(changed, key, adapter, scale)
            parameter.data = changed.to(parameter.dtype)

    def remove(self) -> None:
        """Give the weights back, bit for bit."""
        for (part, key), weight in self.kept.items():
            self.parts[part].get_parameter(key).data = weight
        self.kept.clear()


def add(weight: Tensor, key: tuple[str, str], adapter: Adapter, scale: float) -> None:
    """Add to a float32 weight, in place, what an adapter changes in it. `key` is (part, official name)."""
    for place, factors in adapter.layers.items():
        if (place.part, place.key) == key:
            block = place.block(weight)
            block += scale * factors.delta().to(weight.device).reshape(block.shape)


def path_and_scale(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:scale` of a command line -> the file and its scale, 1 where none is given."""
    name, colon, scale = text.rpartition(":")
    try:
        found = (Path(name), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:
        found = Path(text), 1.0
    if not math.isfinite(found[1]):
        raise InputError(f"the scale of an adapter must be a finite number, found {text}")
    return found


def hashes(given: Sequence[str]) -> list[str]:
    """The sha256 of each adapter's file, for `FILE` or `FILE:scale` of a command line."""
    return [sha256_of(path_and_scale(each)[0]) for each in given]


def put_on(pipelines: Sequence[Any], given: Sequence[str]) -> list[str]:
    """Apply adapters (`FILE` or `FILE:scale`) to each pipeline that they fit; returns what to tell of each.

    An adapter that fits none of the pipelines is an InputError.
    """
    wanted: list[list[tuple[Adapter, float]]] = [[] for _ in pipelines]
    lines = []
    for text in given:
        path, scale = path_and_scale(text)
        errors = []
        for pipe, own in zip(pipelines, wanted, strict=True):
            try:
                own.append((load(path, pipe.config), scale))
                lines.append(f"{path.name} at {scale:g} on the {pipe.config.kind}: {own[-1][0]}")
            except InputError as error:
                errors.append(error)
        if len(errors) == len(pipelines):
            raise errors[0]
    for pipe, own in zip(pipelines, wanted, strict=True):
        parts = {part: getattr(pipe, part) for part in prefixes(pipe.config) if part != "vae"}
        Applied(parts).apply(*own)
    return lines
