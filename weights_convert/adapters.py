"""LoRA files: merge into a checkpoint, extract from two, convert between the forms in use."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref import lora, lora_forms
from sdxl_ref.checkpoint import EXTRAS, Checkpoint, open_checkpoint, prefixes
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.folder import is_finite
from sdxl_ref.identify import differences
from sdxl_ref.layouts import Place
from sdxl_ref.lora import Adapter, Factors
from weights_convert.convert import Report, dtypes_of, entry, model_spec, save
from weights_convert.reports import difference
from weights_convert.stream import Entry


def merge(source: Path, adapters: list[tuple[Path, float]], target: Path, force: bool = False) -> Report:
    """Write a checkpoint with adapters added to its weights, each times a scale; dtypes stay, tensor by tensor."""
    checkpoint = open_checkpoint(source)
    fitted = [(lora.load(path, checkpoint.config), scale) for path, scale in adapters]
    report = Report([f"{path}: {adapter}" for (path, _), (adapter, _) in zip(adapters, fitted, strict=True)])
    changed: dict[str, tuple[str, str]] = {}
    for adapter, _ in fitted:
        for place in adapter.layers:
            changed[prefixes(checkpoint.config)[place.part] + place.key] = place.part, place.key
    dtypes = dtypes_of(checkpoint)
    with checkpoint.reader() as get:

        def read(key: str) -> Tensor:
            tensor = get(key)
            if key not in changed:
                return tensor
            weight = tensor.float().clone()
            for adapter, scale in fitted:
                lora.add(weight, changed[key], adapter, scale)
            merged = weight.to(tensor.dtype)
            if not is_finite(merged):
                raise InputError(f"{key} would hold values that are not finite in {tensor.dtype}: use a lower scale")
            return merged

        entries = [entry(key, dtypes[key], checkpoint.shapes[key], read) for key in sorted(checkpoint.shapes)]
        metadata = dict(checkpoint.metadata) | model_spec(checkpoint.config)
        save(target, entries, metadata, force)
    report.lines.append(f"{target}: {len(changed)} of {len(entries)} tensors changed")
    return report


def extract(first: Path, second: Path, target: Path, rank: int, form: str = "kohya", force: bool = False) -> Report:
    """The best adapter of a rank that takes the first checkpoint to the second (singular values, layer by layer)."""
    if rank < 1:
        raise InputError(f"the rank must be at least 1, found {rank}")
    a, b = open_checkpoint(first), open_checkpoint(second)
    if problems := differences(weights(a), weights(b)):  # not of their metadata, which may be absent
        raise InputError(f"{first} and {second} are no two versions of one model: in the second {problems}")
    dtypes_of(a), dtypes_of(b)  # InputError for what cannot be read
    matrices = lora_forms.matrices(a.config)
    layers: dict[Place, Factors] = {}
    rest = 0.0
    whole = 0.0
    with a.reader() as read_a, b.reader() as read_b:
        others = sorted(weights(a).keys() - matrices.values())
        left = [key for key in others if difference(key, read_a(key).float(), read_b(key).float())]
        for place, key in tqdm(matrices.items(), unit="layer", disable=None):
            change = place.block(read_b(key).float()) - place.block(read_a(key).float())
            if not torch.isfinite(change).all():
                raise InputError(f"{key} holds values that are not finite (NaN or infinite)")
            if change.any():
                layers[place] = factors = svd(change, rank)
                whole += float(change.square().sum())
                rest += float((change - factors.delta().reshape(change.shape)).square().sum())
    names = f": {', '.join(left[:3])}{', …' * (len(left) > 3)}" if left else ""
    beyond = f"{len(left)} other tensors differ, which no adapter carries{names}"
    if not layers:
        raise InputError(f"{first} and {second} have the same matrices: there is nothing to extract; {beyond}")
    write_adapter(target, Adapter(layers), a.config, form, force)
    over = math.sqrt(rest / whole)
    told = f"{target}: {len(layers)} layers of rank at most {rank}; {over:.2e} of the change is left over"
    return Report([told, beyond])


def weights(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what networks read and every file has."""
    found = checkpoint.shapes.items()
    return {key: shape for key, shape in found if not EXTRAS.fullmatch(key) and not key.endswith("logit_scale")}


def svd(change: Tensor, rank: int) -> Factors:
    """The nearest product of two factors (Eckart & Young 1936); both get the roots of the singular values."""
    matrix = change.flatten(1)  # (out, in*kh*kw)
    rank = min(rank, *matrix.shape)
    if 4 * rank < min(matrix.shape):
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=6)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, (v[:, :rank] * root).T
    if change.ndim == 4:
        up, down = up[:, :, None, None], down.reshape(rank, *change.shape[1:])
    return Factors(down.contiguous(), up.contiguous(), float(rank))


def convert_adapter(source: Path, model: Path | ModelConfig, target: Path, form: str, force: bool = False) -> Report:
    """An adapter of any form -> "kohya", "peft" (diffusers' names) or "official"; `model` tells its sizes."""
    config = model if isinstance(model, ModelConfig) else open_checkpoint(model).config
    adapter = lora.load(source, config)
    write_adapter(target, adapter, config, form, force)
    return Report([f"{source}: {adapter}", f"{target}: in the form {form}"])


def write_adapter(target: Path, adapter: Adapter, config: ModelConfig, form: str, force: bool = False) -> None:
    """Write an adapter in a form."""
    found = lora_forms.tensors(adapter, config, form)
    entries = [Entry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in sorted(found.items())]  # type: ignore[misc]
    save(target, entries, lora_forms.metadata(config), force)
