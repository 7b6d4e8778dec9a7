"""What a fine-tuning run leaves: an adapter in two forms, or a whole checkpoint in the official layout."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sdxl_ref.adapters import writing
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.training.adapters import learned
from sdxl_ref.weights.checkpoint import Checkpoint, prefixes
from sdxl_ref.weights.dtypes import is_finite
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.folder_scheduler import metadata_of

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

    `averaged` weights replace the UNet's own. InputError where a weight does not fit into its dtype.
    """
    path = folder / CHECKPOINT
    prefix = prefixes(source.config)["unet"]
    with source.reader() as read:
        state = {key: read(key) for key in source.shapes}  # mapped, not read
        for name, weight in (unet.state_dict() | dict(averaged)).items():
            key = prefix + name
            dtype = state[key].dtype
            state[key] = weight.to("cpu", dtype)
            if not is_finite(state[key]):
                raise InputError(f"{key} does not fit into {dtype}, the source's: train from a float32 file")
        metadata = {key: text for key, text in metadata_of(source).items() if key != "modelspec.hash_sha256"}
        write_tensors(path, {key: tensor.contiguous() for key, tensor in state.items()}, metadata)
    return path
