"""Conversion between an official file and a diffusers folder, as a stream of tensors, bit for bit."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.weights.checkpoint import CONFIG_KEY, SETTINGS_KEY, Checkpoint, prefixes
from sdxl_ref.weights.folder import EXTRAS_FILE, Folder
from sdxl_ref.weights.identity import name_of
from sdxl_ref.weights.layouts import Rule, part_rules
from sdxl_ref.weights.lone_parts import LonePart, find_lone_part, open_part
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.report import dtypes_of as dtypes_of
from sdxl_ref.weights.report import sources_of
from sdxl_ref.weights.stated_config import config_from_json, config_to_json
from sdxl_ref.weights.streaming import HASH_KEY, Entry, total, write_file
from weights_convert import folder_files
from weights_convert.entries import Report as Report
from weights_convert.entries import entry as entry
from weights_convert.entries import lines_on_the_rest, part_entries, progress_bar
from weights_convert.entries import save as save
from weights_convert.folder_settings import configurations_for, in_words, tokenizers_of, unusual_settings
from weights_convert.lone_parts import Part, part_of, part_to_file, part_to_folder
from weights_convert.parts import separate_part
from weights_convert.targets import check_apart, check_target, named_in_pipeline, writing_folder

LAYOUTS = ("official", "diffusers")
LN_100 = math.log(100.0)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    force: bool = False,
    variant: str | None = None,
    vae: Path | None = None,
    openclip: Path | None = None,
    part: str | None = None,
) -> Report:
    """Write `source` (a file or folder) to `target`, as an "official" file or a "diffusers" folder.

    The source may also be one part alone: a UNet, an autoencoder or a text encoder. `part` ("unet", "vae",
    "text_encoder", "text_encoder_2") writes that of a whole model alone.
    `variant`: the one to read of a folder, or the one to write ("fp16": names with it, tensors as they are).
    `vae`, `openclip`: files whose autoencoder, or bigG text tower, takes the place of the source's. InputError for bad
    input before anything is written; what was at `target` stays whole until the new one is.
    """
    if to not in LAYOUTS:
        raise InputError(f"expected the layout {' or '.join(LAYOUTS)}, found {to!r}")
    to_read = None if os.path.isfile(source) else variant
    lone = find_lone_part(source, to_read) if os.path.exists(source) else None
    original = (
        open_checkpoint(source, variant=to_read, vae=None if vae is None else True) if lone is None else open_part(lone)
    )
    read_from = [original.path, *(path for path in (vae, openclip) if path is not None)]
    check_apart(target, read_from, is_folder=to == "diffusers")
    report = Report([f"{source}: {lone.name if lone else name_of(original)}"])
    if lone or part:
        if vae or openclip:
            raise InputError("--vae and --openclip go into a whole model: leave them out for one part of it")
        alone = part_to_write(original, lone, part)
        report.lines += [f"note: {original.note}"] if original.note else []
        if to == "official":
            part_to_file(alone, target, force, report)
        else:
            part_to_folder(alone, target, force, variant, report)
        return report
    checkpoint, own = with_parts(original, vae, openclip, report)
    if to == "official":
        to_file(checkpoint, target, force, report)
    else:
        to_folder(checkpoint, own, target, force, variant, report)
    return report


def part_to_write(original: Checkpoint, lone: LonePart | None, name: str | None) -> Part:
    """The part that is all that there is (`lone`), or this one of a whole model."""
    if lone is None or not isinstance(original, Folder):
        return part_of(original, str(name))
    if name not in (None, lone.part):
        raise InputError(f"{lone.path} is {lone.name}: it has no {name}")
    return Part(original, lone.part, lone)


def with_parts(
    checkpoint: Checkpoint, vae: Path | None, openclip: Path | None, report: Report
) -> tuple[Folder, dict[str, folder_files.Json]]:
    """A checkpoint as tensors that may lie anywhere, with those of separate files in the place of its own.

    And the configuration files of a folder that a separate part has changed.
    """
    sources = sources_of(checkpoint)
    config = checkpoint.config
    files: dict[str, folder_files.Json] = {}
    for part, path in (("vae", vae), ("text_encoder_2", openclip)):
        if path is None:
            continue
        prefix = prefixes(config)[part]
        lone, own = separate_part(path, part, config)
        report.lines.append(f"{part}: {len(own.sources)} tensors of {path}")
        if part == "vae":
            config = replace(config, vae=own.config.vae)
            if config != checkpoint.config:
                report.lines.append(f"vae: the scaling factor {config.vae.scale_factor} of {path}")
            files[folder_files.config_name(part)] = lone.fields or folder_files.part_config(part, config)
        elif "logit_scale" not in own.sources:
            report.lines.append(f"logit_scale: not in {openclip}, the source's stays if it has one")
        sources |= {prefix + key: source for key, source in own.sources.items()}
    shapes = {key: source.shape for key, source in sources.items()}
    known = (checkpoint.metadata, checkpoint.note, checkpoint.defaults)
    return Folder(checkpoint.path, config, shapes, *known, sources=sources), files


def scale_key(config: ModelConfig) -> str:
    """The one number that an official file has and no folder: CLIP's temperature, which no picture needs."""
    return prefixes(config)["text_encoder_2"] + "logit_scale"


# --- to a file ------------------------------------------------------------------------------------------------------


def to_file(checkpoint: Checkpoint, target: Path, force: bool, report: Report) -> None:
    dtypes = dtypes_of(checkpoint)
    [(dtype, _)] = Counter(dtypes.values()).most_common(1)
    metadata = metadata_for(checkpoint, report)
    with checkpoint.reader() as read:
        entries = [entry(key, dtypes[key], shape, read) for key, shape in checkpoint.shapes.items()]
        entries += defaults(checkpoint, dtype, report)
        entries.sort(key=attrgetter("name"))
        digest = save(target, entries, metadata, force)
    report.lines.append(f"{target}: {len(entries)} tensors, {total(entries) / 1e9:.2f} GB, sha256 of them {digest}")


def metadata_for(checkpoint: Checkpoint, report: Report) -> dict[str, str]:
    """All that a model's metadata said, brought up to its configuration where a folder's files were edited since."""
    metadata = model_spec(checkpoint.config) | dict(checkpoint.metadata)
    said = metadata.get(CONFIG_KEY)
    if said is not None and config_from_json(said) != checkpoint.config:
        metadata[CONFIG_KEY] = config_to_json(checkpoint.config)
    if prediction_of(metadata["modelspec.prediction_type"]) != checkpoint.config.prediction:
        metadata["modelspec.prediction_type"] = checkpoint.config.prediction
    if checkpoint.path.is_dir():
        metadata.pop(SETTINGS_KEY, None)  # of an earlier folder
        if settings := unusual_settings(checkpoint):
            metadata[SETTINGS_KEY] = json.dumps(settings)
            words = in_words(settings, checkpoint.config)
            report.lines.append(
                f"an official file has no place for the folder's {words}: kept in its metadata, where sdxl-ref reads"
                " them; other tools want them as their own options"
            )
    return metadata


def prediction_of(text: str) -> str:
    """What a UNet returns, in the words of our configurations: "v" for every spelling of v_prediction."""
    return "v" if text.lower().startswith("v") else text


def defaults(checkpoint: Checkpoint, dtype: torch.dtype, report: Report) -> list[Entry]:
    """What every official file has, and a folder that others wrote has not: ours says what its file had."""
    if is_ours(checkpoint.path):
        return []
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


def is_ours(path: Path) -> bool:
    """Whether a folder was made of an official file, whose tensors it then holds to the last one."""
    return (path / EXTRAS_FILE).is_file()


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
        fields[CONFIG_KEY] = config_to_json(config)
    return fields


# --- to a folder ----------------------------------------------------------------------------------------------------


def to_folder(
    checkpoint: Checkpoint,
    own: dict[str, folder_files.Json],
    target: Path,
    force: bool,
    variant: str | None,
    report: Report,
) -> None:
    """`own`: configuration files of parts that came from elsewhere."""
    dtypes = dtypes_of(checkpoint)
    rules = {part: rules_with_place(part, checkpoint.config) for part in prefixes(checkpoint.config)}
    without_place = checkpoint.shapes.keys() - set(chain(*rules.values()))
    files = configurations_for(checkpoint, own, report.lines)
    kept: list[str] = []
    with checkpoint.reader() as read:
        parts = {part: part_entries(rules[part], checkpoint, dtypes, read) for part in rules}
        extras = [entry(key, dtypes[key], checkpoint.shapes[key], read) for key in sorted(without_place)]
        everything = list(chain(*parts.values(), extras))
        check_target(target, total(everything), force, is_folder=True)
        with writing_folder(target, force, named_in_pipeline, kept) as folder, progress_bar(everything) as progress:
            folder_files.write_configurations(folder, files, tokenizers_of(checkpoint))
            for part, entries in parts.items():
                write_file(folder / folder_files.weights_name(part, variant), entries, {"format": "pt"}, progress)
            if extras or is_ours(checkpoint.path) or not checkpoint.path.is_dir():
                left_out = (HASH_KEY, SETTINGS_KEY)
                metadata = {key: text for key, text in checkpoint.metadata.items() if key not in left_out}
                write_file(folder / EXTRAS_FILE, extras, metadata, progress)
    counts = ", ".join(f"{part} {len(entries)}" for part, entries in parts.items())
    report.lines.append(f"{target}: {counts} tensors")
    report.lines += lines_on_the_rest(target, extras, kept)


def rules_with_place(part: str, config: ModelConfig) -> dict[str, Rule]:
    """The rule of each tensor of a part that has a place in a folder, by its official key."""
    _, rules = part_rules(part, config)
    return {prefixes(config)[part] + rule.official: rule for rule in rules if rule.other}
