"""Conversion between an official file and a diffusers folder, as a stream of tensors, bit for bit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref import layouts
from sdxl_ref.checkpoint import CONFIG_KEY, Checkpoint, open_checkpoint, prefixes
from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.folder import EXTRAS_FILE, Folder, part_rules
from weights_convert import folder_files
from weights_convert.parts import Tensors, openclip_tensors, vae_tensors
from weights_convert.stream import (
    HASH_KEY,
    Entry,
    beside,
    check_target,
    clear,
    dtypes_in,
    put_in_place,
    total,
    write_file,
)

LN_100 = math.log(100.0)
Read = Callable[[str], Tensor]


@dataclass
class Report:
    """What a conversion did, in words."""

    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    force: bool = False,
    variant: str | None = None,
    vae: Path | None = None,
    openclip: Path | None = None,
) -> Report:
    """Write `source` (a file or folder) to `target`, as an "official" file or a "diffusers" folder.

    `variant`: the one to read of a folder, or the one to write ("fp16": names with it, tensors as they are).
    `vae`, `openclip`: files whose autoencoder, or bigG text tower, takes the place of the source's. InputError for bad
    input before anything is written; what was at `target` stays whole until the new one is.
    """
    if to not in ("official", "diffusers"):
        raise InputError(f"expected the layout official or diffusers, found {to!r}")
    checkpoint = open_checkpoint(source, variant)
    inner, outer = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if to == "diffusers" and inner != outer and (outer in inner.parents or inner in outer.parents):
        raise InputError(f"{target} and {source} lie one inside the other: name another target")
    report = Report([f"{source}: {checkpoint.name}"])
    given = {"vae": (vae, vae_tensors), "text_encoder_2": (openclip, openclip_tensors)}
    replaced: dict[str, Tensors] = {}
    for part, (path, tensors) in given.items():
        if path is not None:
            found = tensors(path, checkpoint.config)
            replaced |= {prefixes(checkpoint.config)[part] + key: tensor for key, tensor in found.items()}
            report.lines.append(f"{part}: {len(found)} tensors of {path}")
            if part == "text_encoder_2" and "logit_scale" not in found:
                report.lines.append(f"logit_scale: not in {path}, the source's stays if it has one")
    with reading(checkpoint, replaced) as (read, dtypes):
        shapes = dict.fromkeys(replaced, ()) | dict(checkpoint.shapes)  # what may be new there is logit_scale, a number
        checkpoint = replace(checkpoint, shapes=shapes)
        if to == "official":
            to_file(checkpoint, read, dtypes, target, force, report)
        else:
            to_folder(checkpoint, read, dtypes, target, force, variant, report)
    return report


@contextmanager
def reading(checkpoint: Checkpoint, replaced: dict[str, Tensors]) -> Iterator[tuple[Read, dict[str, torch.dtype]]]:
    """A function that reads tensors by official names, and the dtype of each; `replaced` come from elsewhere."""
    with checkpoint.reader() as get:
        dtypes = dtypes_of(checkpoint) | {key: tensor().dtype for key, tensor in replaced.items()}
        yield lambda key: replaced[key]() if key in replaced else get(key), dtypes


def dtypes_of(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The dtype of every tensor, from the headers alone. InputError for one that no weights have."""
    places = {key: (checkpoint.path, key) for key in checkpoint.shapes}
    if isinstance(checkpoint, Folder):
        places = {key: found[0] for key, (_, found) in checkpoint.sources.items()}
    files = {path: dtypes_in(path) for path in {path for path, _ in places.values()}}
    return {key: files[path][name] for key, (path, name) in places.items()}


def to_file(
    checkpoint: Checkpoint, read: Read, dtypes: Mapping[str, torch.dtype], target: Path, force: bool, report: Report
) -> None:
    entries = [entry(key, dtypes[key], checkpoint.shapes[key], read) for key in sorted(checkpoint.shapes)]
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    entries += defaults(checkpoint, common, report)
    metadata = model_spec(checkpoint.config) | dict(checkpoint.metadata)
    digest = save(target, sorted(entries), metadata, force)
    report.lines.append(f"{target}: {len(entries)} tensors, {total(entries) / 1e9:.2f} GB, sha256 of them {digest}")


def save(target: Path, entries: list[Entry], metadata: Mapping[str, str], force: bool) -> str:
    """Write one file beside and put it in place; returns the sha256 of its tensors."""
    check_target(target, total(entries), force)
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file for the official layout")
    try:
        with bar(entries) as progress:
            digest = write_file(beside(target), entries, metadata, progress)
        put_in_place(target)
    except OSError as error:
        raise InputError(f"could not write {target}: {error.strerror or error}") from error
    finally:
        clear(beside(target))
    return digest


def defaults(checkpoint: Checkpoint, dtype: torch.dtype, report: Report) -> list[Entry]:
    """What every official file has, and a folder without our file of extras has not."""
    found = []
    scale = prefixes(checkpoint.config)["text_encoder_2"] + "logit_scale"
    if scale not in checkpoint.shapes:
        found.append(entry(scale, dtype, (), lambda _: torch.tensor(LN_100, dtype=dtype)))
        report.lines.append(f"{scale}: not in the source, written as ln 100")
    if "denoiser.sigmas" not in checkpoint.shapes and checkpoint.path.is_dir():
        from sdxl_ref.diffusion.schedule import NoiseSchedule

        found.append(entry("denoiser.sigmas", dtype, (1000,), lambda _: NoiseSchedule().sigmas.to(dtype)))
        report.lines.append("denoiser.sigmas: not in the source, written as SDXL's schedule")
    return found


def entry(name: str, dtype: torch.dtype, shape: Iterable[int], read: Read) -> Entry:
    return Entry(name, dtype, tuple(shape), lambda: read(name))


def model_spec(config: ModelConfig) -> dict[str, str]:
    """Metadata of a written file: ModelSpec 1.0.0's fields, and the sizes where they are not the official ones."""
    fields = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-xl-v1-{config.kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"Stable Diffusion XL 1.0 {config.kind.title()}",
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.prediction_type": "epsilon",
        HASH_KEY: "",
    }
    if config.kind == "refiner":
        fields["modelspec.timestep_range"] = "0,199"
    return fields | ({} if config in (REFINER_1_0, BASE_1_0) else {CONFIG_KEY: config.to_json()})


def to_folder(
    checkpoint: Checkpoint,
    read: Read,
    dtypes: Mapping[str, torch.dtype],
    target: Path,
    force: bool,
    variant: str | None,
    report: Report,
) -> None:
    parts = {part: part_entries(part, checkpoint, read, dtypes) for part in prefixes(checkpoint.config)}
    used = {key for part in prefixes(checkpoint.config) for key in with_place(part, checkpoint.config)}
    left = [
        entry(key, dtypes[key], checkpoint.shapes[key], read) for key in sorted(checkpoint.shapes) if key not in used
    ]
    check_target(target, sum(total(entries) for entries in parts.values()) + total(left), force)
    if target.is_file():
        raise InputError(f"{target} is a file: name a folder for diffusers' layout")
    new, middle = beside(target), f".{variant}" if variant else ""
    try:
        new.mkdir()
        write_configurations(new, checkpoint.config)
        with bar([each for entries in (*parts.values(), left) for each in entries]) as progress:
            for part, entries in parts.items():
                path = new / part / f"{folder_files.WEIGHTS[part]}{middle}.safetensors"
                write_file(path, entries, {"format": "pt"}, progress)
            if left:
                kept = {key: value for key, value in checkpoint.metadata.items() if key != HASH_KEY}
                write_file(new / EXTRAS_FILE, left, kept, progress)
        put_in_place(target)
    except OSError as error:
        raise InputError(f"could not write {target}: {error.strerror or error}") from error
    finally:
        clear(new)
    names = ", ".join(f"{part} {len(entries)}" for part, entries in parts.items())
    report.lines.append(f"{target}: {names} tensors")
    if left:
        report.lines.append(
            f"{EXTRAS_FILE}: {', '.join(each.name for each in left)}, which the layout has no place for"
        )


def with_place(part: str, config: ModelConfig) -> dict[str, layouts.Rule]:
    """Official names, prefix included, of the tensors that have a place in a folder, and the rule of each."""
    _, rules = part_rules(part, config)
    return {prefixes(config)[part] + rule.official: rule for rule in rules if rule.other}


def part_entries(part: str, checkpoint: Checkpoint, read: Read, dtypes: Mapping[str, torch.dtype]) -> list[Entry]:
    """The tensors of a part under diffusers' names; q, k and v of a stacked projection are read one at a time."""
    found = []
    for key, rule in with_place(part, checkpoint.config).items():
        shapes = [tuple(each.shape) for each in rule.split(torch.empty(checkpoint.shapes[key], device="meta"))]
        for i, (name, shape) in enumerate(zip(rule.other, shapes, strict=True)):
            found.append(Entry(name, dtypes[key], shape, lambda key=key, rule=rule, i=i: rule.split(read(key))[i]))  # type: ignore[misc]
    return sorted(found)


def write_configurations(folder: Path, config: ModelConfig) -> None:
    (folder / "model_index.json").write_text(json.dumps(folder_files.model_index(config), indent=2) + "\n")
    for part in prefixes(config):
        (folder / part).mkdir()
        text = json.dumps(folder_files.part_config(part, config), indent=2) + "\n"
        (folder / part / "config.json").write_text(text)
    (folder / "scheduler").mkdir()
    text = json.dumps(folder_files.SCHEDULER, indent=2) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    if config.kind == "base":
        folder_files.write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    folder_files.write_tokenizer(folder / "tokenizer_2", "!")


@contextmanager
def bar(entries: list[Entry]) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total(entries), unit="B", unit_scale=True, disable=None) as progress:
        yield progress.update
