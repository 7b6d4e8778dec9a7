"""What a folder says besides its model: its own configuration files, kept as they are where a folder is written again.

An official file has no place for a folder's scheduler or for its rule of the empty prompt. Where these are not those
of SD-XL 1.0 they go into the file's metadata, so that the way back finds them, and the report says so.
"""

from collections.abc import Mapping
from pathlib import Path

from sdxl_ref.config import ModelConfig
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.folder_config import CLASSES, FLAGS
from sdxl_ref.weights.folder_scheduler import SCHEDULER_CONFIG, kept_files
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.tensor_files import FOLDER_INDEX
from weights_convert.folder_files import ABSENT, Json, configurations

OF_NO_EFFECT = {  # on Euler: fields of other schedulers are carried along
    "_diffusers_version",
    "_name_or_path",
    "clip_sample",
    "clip_sample_range",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
}
USUAL = {"final_sigmas_type": "zero", "timestep_type": "discrete"}  # what Euler does where the fields are absent


def configurations_for(checkpoint: Checkpoint, replaced: dict[str, Json], report: list[str]) -> dict[str, Json]:
    """The configuration files of a folder to be written: what was read, and SDXL's own where nothing was.

    `replaced` are those of parts that came from elsewhere.
    """
    usual = configurations(checkpoint.config)
    if not checkpoint.path.is_dir():
        return usual | with_class(kept_files(str(checkpoint.path), checkpoint.metadata), usual)
    own = {name: read_json(checkpoint.path / name) for name in usual if (checkpoint.path / name).is_file()}
    own[FOLDER_INDEX] = without_strangers(own[FOLDER_INDEX], report)
    return usual | own | replaced


def with_class(settings: Mapping[str, Json], usual: Mapping[str, Json]) -> dict[str, Json]:
    """The same with what files of a folder say of one another: the index names the scheduler's class."""
    index = usual[FOLDER_INDEX] | settings.get(FOLDER_INDEX, {})
    scheduler = usual[SCHEDULER_CONFIG] | settings.get(SCHEDULER_CONFIG, {})
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    return {FOLDER_INDEX: index, SCHEDULER_CONFIG: settings.get(SCHEDULER_CONFIG, scheduler)}


def without_strangers(index: Json, report: list[str]) -> Json:
    """An index without the parts that no SDXL pipeline reads, whose folders are not written."""
    known = {*CLASSES, "tokenizer", "tokenizer_2", "scheduler"}
    strangers = [
        name for name, value in index.items() if isinstance(value, list) and value != ABSENT and name not in known
    ]
    if strangers:
        report.append(f"{', '.join(strangers)}: left out, which are no parts of SDXL's")
    return {name: value for name, value in index.items() if name not in strangers}


def tokenizers_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """The tokenizers of a folder, which are copied."""
    folders = {name: checkpoint.path / name for name in ("tokenizer", "tokenizer_2")}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def unusual_settings(checkpoint: Checkpoint) -> dict[str, Json]:
    """What a folder says of scheduler and prompt that SD-XL 1.0 does not; empty for a file."""
    if not checkpoint.path.is_dir():
        return {}
    usual = configurations(checkpoint.config)
    settings = {}
    scheduler = checkpoint.path / SCHEDULER_CONFIG
    index = read_json(checkpoint.path / FOLDER_INDEX)
    if scheduler.is_file():
        own = read_json(scheduler)
        _, name = index.get("scheduler") or (None, None)
        own |= {"_class_name": name} if name else {}  # the index decides
        if significant(own) != significant(usual[SCHEDULER_CONFIG]):
            settings[SCHEDULER_CONFIG] = own
    fields = {
        name: index[name] for name in FLAGS if name in index and index[name] != usual[FOLDER_INDEX].get(name, False)
    }
    if checkpoint.defaults.refusal and not scheduler.is_file():
        fields["scheduler"] = index["scheduler"]  # whose settings are missing
    if fields:
        settings[FOLDER_INDEX] = fields
    return settings


def significant(fields: Json) -> Json:
    """The fields of a scheduler that have a say, without those that are off."""
    return {
        name: value
        for name, value in fields.items()
        if name not in OF_NO_EFFECT and value not in (None, False) and USUAL.get(name) != value
    }


def in_words(settings: Mapping[str, Json], config: ModelConfig) -> str:
    """The fields that differ from SDXL's, in one line."""
    usual = configurations(config)
    words = []
    for name, fields in settings.items():
        before = significant(usual[name])
        found = significant(fields) if name == SCHEDULER_CONFIG else fields
        words += [f"{key} {value!r}" for key, value in found.items() if before.get(key) != value]
        if name == SCHEDULER_CONFIG:
            words += [f"no {key}" for key in before if key not in found]
    return ", ".join(words)
