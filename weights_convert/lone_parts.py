"""Conversion of one part of a model alone: of a file that holds nothing else, or out of a whole checkpoint.

In diffusers' layout a part is a folder with `config.json` and weights, as `UNet2DConditionModel`, `AutoencoderKL` and
transformers' text encoders open it; officially it is a file of the part's official names.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path

import torch

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError
from sdxl_ref.weights.checkpoint import CONFIG_KEY, Checkpoint, prefixes
from sdxl_ref.weights.folder import EXTRAS_FILE, Folder
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.layouts import Rule, part_rules
from sdxl_ref.weights.lone_parts import PREFIX_KEY, LonePart
from sdxl_ref.weights.report import dtypes_of, sources_of
from sdxl_ref.weights.stated_config import config_from_json, config_to_json
from sdxl_ref.weights.streaming import HASH_KEY, Entry, total, write_file
from sdxl_ref.weights.tensor_files import FOLDER_INDEX
from weights_convert.entries import Read, Report, lines_on_the_rest, part_entries, progress_bar, save
from weights_convert.folder_files import Json, config_name, part_config, weights_name, write_json
from weights_convert.targets import PART_CONFIG, check_target, named_in_part, writing_folder


@dataclass(frozen=True)
class Part:
    """A part to be written: its tensors by official names without a prefix, its name in a pipeline, where it lay.

    `lone`: the file or folder that held nothing else; None where it comes out of a whole model.
    """

    checkpoint: Folder
    name: str
    lone: LonePart | None = None

    @property
    def prefix(self) -> str:
        """What stands before its official names in a file."""
        return self.lone.official_prefix if self.lone else ""

    @property
    def fields(self) -> Json:
        """Its `config.json`: that of the folder that is read, or one of its sizes."""
        usual = part_config(self.name, self.checkpoint.config)
        if self.lone is not None:
            return self.lone.fields or usual
        path = self.checkpoint.path / config_name(self.name)
        return read_json(path) if path.is_file() else usual

    @cached_property
    def placed(self) -> dict[str, Rule]:
        """The rule of each tensor that both layouts have a place for."""
        _, rules = part_rules(self.name, self.checkpoint.config)
        return {rule.official: rule for rule in rules if rule.other and rule.official in self.checkpoint.shapes}

    def name_of(self, key: str) -> str:
        """Of a tensor in a file; what the layouts have no place for keeps the name that it has."""
        if key in self.placed:
            return self.prefix + key
        return self.checkpoint.sources[key].tensors[0].name if self.lone else key

    def entry(self, key: str, read: Read) -> Entry:
        shape = self.checkpoint.shapes[key]
        return Entry(self.name_of(key), self.dtypes[key], shape, partial(read, key))

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return dtypes_of(self.checkpoint)


def part_of(checkpoint: Checkpoint, name: str) -> Part:
    """One part of a whole checkpoint. InputError where it has no such part."""
    if name not in prefixes(checkpoint.config):
        parts = ", ".join(prefixes(checkpoint.config))
        raise InputError(f"{checkpoint.path}, a {checkpoint.config.kind}, has no {name}: expected one of {parts}")
    prefix = prefixes(checkpoint.config)[name]
    sources = {
        key.removeprefix(prefix): source for key, source in sources_of(checkpoint).items() if key.startswith(prefix)
    }
    shapes = {key: source.shape for key, source in sources.items()}
    config = checkpoint.config
    return Part(Folder(checkpoint.path, config, shapes, {}, checkpoint.note, sources=sources), name)


def part_to_file(part: Part, target: Path, force: bool, report: Report) -> None:
    """Write a part under its official names."""
    config = part.checkpoint.config
    metadata = {"format": "pt"} | dict(part.checkpoint.metadata)
    metadata.pop(PREFIX_KEY, None)
    said = metadata.get(CONFIG_KEY)
    if config not in (BASE_1_0, REFINER_1_0) and (said is None or config_from_json(said) != config):
        metadata[CONFIG_KEY] = config_to_json(config)
    with part.checkpoint.reader() as read:
        entries = [part.entry(key, read) for key in part.checkpoint.shapes]
        entries.sort(key=attrgetter("name"))
        digest = save(target, entries, metadata, force)
    report.lines.append(f"{target}: {len(entries)} tensors, {total(entries) / 1e9:.2f} GB, sha256 of them {digest}")


def part_to_folder(part: Part, target: Path, force: bool, variant: str | None, report: Report) -> None:
    """Write a part as the folder that it is in diffusers' layout. The weights' metadata keep what the file's said."""
    if (target / FOLDER_INDEX).exists():
        raise InputError(f"{target} is a whole model's folder: name {target / part.name} for this part of it")
    metadata = {"format": "pt"} | {key: text for key, text in part.checkpoint.metadata.items() if key != HASH_KEY}
    if part.prefix:
        metadata[PREFIX_KEY] = part.prefix
    kept: list[str] = []
    with part.checkpoint.reader() as read:
        entries = part_entries(part.placed, part.checkpoint, part.dtypes, read)
        extras = [part.entry(key, read) for key in sorted(part.checkpoint.shapes.keys() - part.placed.keys())]
        everything = [*entries, *extras]
        check_target(target, total(everything), force, is_folder=True)
        with writing_folder(target, force, named_in_part, kept) as folder, progress_bar(everything) as progress:
            folder.mkdir()
            write_json(folder / PART_CONFIG, part.fields)
            write_file(folder / Path(weights_name(part.name, variant)).name, entries, metadata, progress)
            if extras:
                write_file(folder / EXTRAS_FILE, extras, {}, progress)
    report.lines.append(f"{target}: {part.name} {len(entries)} tensors")
    report.lines += lines_on_the_rest(target, extras, kept)
