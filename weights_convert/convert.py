"""Conversion between an official file and a diffusers folder, as a stream of tensors, bit for bit."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.weights.checkpoint import CONFIG_KEY, Checkpoint, prefixes
from sdxl_ref.weights.folder import EXTRAS_FILE, Folder
from sdxl_ref.weights.folder_saving import replacing_folder
from sdxl_ref.weights.layouts import Rule, part_rules
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.report import dtypes_of as dtypes_of
from sdxl_ref.weights.report import sources_of
from sdxl_ref.weights.saving import replacing
from weights_convert import folder_files
from weights_convert.parts import openclip_sources, vae_sources
from weights_convert.stream import HASH_KEY, Entry, total, write_file
from weights_convert.targets import check_apart, check_target

LAYOUTS = ("official", "diffusers")
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
    if to not in LAYOUTS:
        raise InputError(f"expected the layout {' or '.join(LAYOUTS)}, found {to!r}")
    original = open_checkpoint(source, variant=variant)
    if to == "diffusers":
        check_apart(source, target)
    report = Report([f"{source}: {original.name}"])
    checkpoint = with_parts(original, vae, openclip, report)
    if to == "official":
        to_file(checkpoint, target, force, report)
    else:
        to_folder(checkpoint, target, force, variant, report)
    return report


def with_parts(checkpoint: Checkpoint, vae: Path | None, openclip: Path | None, report: Report) -> Folder:
    """A checkpoint as tensors that may lie anywhere, with those of separate files in the place of its own."""
    sources = sources_of(checkpoint)
    if vae is not None:
        own = vae_sources(vae, checkpoint.config)
        report.lines.append(f"vae: {len(own)} tensors of {vae}")
        sources |= own
    if openclip is not None:
        own = openclip_sources(openclip, checkpoint.config)
        report.lines.append(f"text_encoder_2: {len(own)} tensors of {openclip}")
        if scale_key(checkpoint.config) not in own:
            report.lines.append(f"logit_scale: not in {openclip}, the source's stays if it has one")
        sources |= own
    shapes = {key: source.shape for key, source in sources.items()}
    return Folder(
        checkpoint.path, checkpoint.config, shapes, checkpoint.metadata, checkpoint.note, checkpoint.defaults, sources
    )


def scale_key(config: ModelConfig) -> str:
    """The one number that an official file has and no folder: CLIP's temperature, which no picture needs."""
    return prefixes(config)["text_encoder_2"] + "logit_scale"


# --- to a file ------------------------------------------------------------------------------------------------------


def to_file(checkpoint: Checkpoint, target: Path, force: bool, report: Report) -> None:
    dtypes = dtypes_of(checkpoint)
    [(dtype, _)] = Counter(dtypes.values()).most_common(1)
    with checkpoint.reader() as read:
        entries = [entry(key, dtypes[key], shape, read) for key, shape in checkpoint.shapes.items()]
        entries += defaults(checkpoint, dtype, report)
        entries.sort(key=attrgetter("name"))
        metadata = model_spec(checkpoint.config) | dict(checkpoint.metadata)
        digest = save(target, entries, metadata, force)
    report.lines.append(f"{target}: {len(entries)} tensors, {total(entries) / 1e9:.2f} GB, sha256 of them {digest}")


def entry(name: str, dtype: torch.dtype, shape: Iterable[int], read: Read) -> Entry:
    """A tensor to be written under the name by which it is read."""
    return Entry(name, dtype, tuple(shape), partial(read, name))


def defaults(checkpoint: Checkpoint, dtype: torch.dtype, report: Report) -> list[Entry]:
    """What every official file has, and a folder without our file of extras has not."""
    entries = []
    scale = scale_key(checkpoint.config)
    if scale not in checkpoint.shapes:
        value = torch.tensor(LN_100, dtype=dtype)
        entries.append(Entry(scale, dtype, (), lambda: value))
        report.lines.append(f"{scale}: not in the source, written as ln 100")
    if "denoiser.sigmas" not in checkpoint.shapes and checkpoint.path.is_dir():
        sigmas = NoiseSchedule().sigmas.to(dtype)
        entries.append(Entry("denoiser.sigmas", dtype, tuple(sigmas.shape), lambda: sigmas))
        report.lines.append("denoiser.sigmas: not in the source, written as SDXL's schedule")
    return entries


def save(target: Path, entries: Sequence[Entry], metadata: Mapping[str, str], force: bool) -> str:
    """Write one file where `check_target` allows it, whole or not at all; returns the sha256 of its tensors."""
    check_target(target, total(entries), force)
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file for the official layout")
    with replacing(target) as new, progress_bar(entries) as progress:
        digest = write_file(new, entries, metadata, progress)
    return digest


def model_spec(config: ModelConfig) -> dict[str, str]:
    """Metadata of a written file: ModelSpec 1.0.0's fields, and the sizes where they are not the official ones."""
    fields = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-xl-v1-{config.kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"Stable Diffusion XL 1.0 {config.kind.title()}",
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.prediction_type": config.prediction,
        HASH_KEY: "",
    }
    if config.kind == "refiner":
        fields["modelspec.timestep_range"] = "0,199"
    if config not in (REFINER_1_0, BASE_1_0):
        fields[CONFIG_KEY] = config.to_json()
    return fields


# --- to a folder ----------------------------------------------------------------------------------------------------


def to_folder(checkpoint: Checkpoint, target: Path, force: bool, variant: str | None, report: Report) -> None:
    dtypes = dtypes_of(checkpoint)
    rules = {part: rules_with_place(part, checkpoint.config) for part in prefixes(checkpoint.config)}
    without_place = checkpoint.shapes.keys() - set(chain(*rules.values()))
    with checkpoint.reader() as read:
        parts = {part: part_entries(rules[part], checkpoint, dtypes, read) for part in rules}
        extras = [entry(key, dtypes[key], checkpoint.shapes[key], read) for key in sorted(without_place)]
        everything = list(chain(*parts.values(), extras))
        check_target(target, total(everything), force)
        if target.is_file():
            raise InputError(f"{target} is a file: name a folder for diffusers' layout")
        with replacing_folder(target) as folder, progress_bar(everything) as progress:
            folder_files.write_configurations(folder, checkpoint.config)
            for part, entries in parts.items():
                write_file(folder / folder_files.weights_name(part, variant), entries, {"format": "pt"}, progress)
            if extras:
                metadata = {key: text for key, text in checkpoint.metadata.items() if key != HASH_KEY}
                write_file(folder / EXTRAS_FILE, extras, metadata, progress)
    counts = ", ".join(f"{part} {len(entries)}" for part, entries in parts.items())
    report.lines.append(f"{target}: {counts} tensors")
    if extras:
        names = ", ".join(extra.name for extra in extras)
        report.lines.append(f"{EXTRAS_FILE}: {names}, which the layout has no place for")


def rules_with_place(part: str, config: ModelConfig) -> dict[str, Rule]:
    """The rule of each tensor of a part that has a place in a folder, by its official key."""
    _, rules = part_rules(part, config)
    return {prefixes(config)[part] + rule.official: rule for rule in rules if rule.other}


def part_entries(
    rules: Mapping[str, Rule], checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], read: Read
) -> list[Entry]:
    """The tensors of a part under diffusers' names; q, k and v of a stacked projection are read one at a time."""
    entries = []
    for key, rule in rules.items():
        whole = torch.empty(checkpoint.shapes[key], device="meta")
        for i, (name, piece) in enumerate(zip(rule.other, rule.split(whole), strict=True)):
            entries.append(Entry(name, dtypes[key], tuple(piece.shape), partial(read_piece, read, key, rule, i)))
    return sorted(entries, key=attrgetter("name"))


def read_piece(read: Read, key: str, rule: Rule, index: int) -> Tensor:
    """One of the tensors that an official one is in the other layout."""
    return rule.split(read(key))[index]


@contextmanager
def progress_bar(entries: Iterable[Entry]) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of bytes that were written; nothing is shown where there is no terminal."""
    with tqdm(total=total(entries), unit="B", unit_scale=True, disable=None) as progress:
        yield progress.update
