"""What a fine-tuning run leaves: an adapter in two forms, or a whole checkpoint in the official layout."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_ref.adapters import writing
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.training.adapters import learned
from sdxl_ref.training.processes import this_process, whole
from sdxl_ref.weights.checkpoint import Checkpoint, prefixes
from sdxl_ref.weights.dtypes import is_finite
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.folder_scheduler import metadata_of
from sdxl_ref.weights.saving import replacing
from sdxl_ref.weights.streaming import HASH_KEY, Entry, write_file

ADAPTERS = {"kohya": "lora_kohya.safetensors", "peft": "lora_peft.safetensors"}
CHECKPOINT = "finetuned.safetensors"


def write_adapter(
    folder: Path, config: ModelConfig, factors: nn.ModuleDict, averaged: Mapping[str, Tensor]
) -> list[Path]:
    """What was learned, as a file in kohya's form and one in PEFT's. `averaged` weights replace the last ones.

    InputError where a factor is not finite.
    """
    adapter = learned(factors, averaged)
    for place, layer in adapter.layers.items():
        if not all(is_finite(tensor) for tensor in layer.tensors().values()):
            raise InputError(f"the LoRA of {place.part}.{place.key} is not finite: use a lower learning rate")
    paths = []
    for form, name in ADAPTERS.items():
        write_tensors(folder / name, writing.tensors(adapter, config, form), writing.metadata(config))
        paths.append(folder / name)
    return paths


def write_checkpoint(folder: Path, source: Checkpoint, unet: nn.Module, averaged: Mapping[str, Tensor]) -> Path:
    """The source with another UNet in its place: official layout, every tensor in the dtype that it had there.

    `averaged` weights replace the UNet's own. Where these are shards, all processes gather one tensor after the other,
    and the first one writes. InputError where a weight does not fit into its dtype.
    """
    path = folder / CHECKPOINT
    prefix = prefixes(source.config)["unet"]
    weights = {prefix + name: weight for name, weight in (unet.state_dict() | dict(averaged)).items()}
    metadata = {key: text for key, text in metadata_of(source).items() if key != HASH_KEY}
    with source.reader() as read:
        dtypes = {key: read(key).dtype for key in source.shapes}  # mapped, not read
        keys = sorted(
            dtypes, key=lambda key: (-dtypes[key].itemsize, key)
        )  # so that each lies at a multiple of its size
        learned_tensors = gathered({key: weights[key] for key in keys if key in weights}, dtypes)
        reads = {key: partial(next, learned_tensors) if key in weights else partial(read, key) for key in keys}
        entries = [Entry(key, dtypes[key], source.shapes[key], reads[key]) for key in keys]
        try:
            if this_process().leads:
                with replacing(path) as beside:
                    write_file(beside, entries, metadata)
        finally:
            for _ in learned_tensors:  # the others wait for each tensor, also where nothing is written
                pass
    return path


def gathered(weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> Iterator[Tensor]:
    """Weights, whole and on the CPU, in these dtypes, one at a time. InputError where one does not fit into its own."""
    for key, weight in weights.items():
        tensor = whole(weight).to("cpu", dtypes[key])
        if not is_finite(tensor):
            raise InputError(f"{key} does not fit into {dtypes[key]}, the source's: train from a float32 file")
        yield tensor
