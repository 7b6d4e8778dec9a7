"""Write a pipeline's model into a folder that opens again. Loaded when it is asked to."""

import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdxl_ref.config import SDXL, InputError
from sdxl_ref.networks.packing import is_packed, is_without_weights
from sdxl_ref.weights.checkpoint import CONFIG_KEY, SETTINGS_KEY, expected_shapes, prefixes
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.folder_scheduler import metadata_of
from sdxl_ref.weights.saving import explained
from sdxl_ref.weights.stated_config import config_to_json
from sdxl_ref.weights.tensor_files import FOLDER_INDEX

TWO = "an ensemble is two models: call ensemble.base.save_pretrained(…) and ensemble.refiner.save_pretrained(…)"


def save_pretrained(
    pipe: Any, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None
) -> None:
    """Write the model as one file in the official layout, `sdxl_base.safetensors` or `sdxl_refiner.safetensors`.

    `from_pretrained(folder)` opens it again, bit for bit: each network in its dtype, the configuration, and how a
    folder said that the model is run. It is written beside and renamed. For a folder in diffusers' layout, convert it:
    `weights-convert convert FOLDER/sdxl_refiner.safetensors NEW --to diffusers`. `variant` is of that layout: a warning
    says that it is not used. InputError where networks are packed, not read yet or of other sizes, where adapters are
    on, where the model's own way of running was changed by hand, and where the folder holds another model.
    """
    if len(pipe.models()) > 1:
        raise InputError(TWO)
    if not safe_serialization:
        raise InputError("only safetensors files are written, never a pickle: leave safe_serialization=False out")
    state = state_of(pipe)
    metadata = {"format": "pt", CONFIG_KEY: config_to_json(pipe.config)} | run_settings(pipe)
    file = Path(save_directory) / f"sdxl_{pipe.config.kind}.safetensors"
    make_folder(file)
    if variant is not None:
        warnings.warn(f"the variant {variant!r} is not used: {file} is one file, in each network's dtype", stacklevel=2)
    write_tensors(file, state, metadata)


def state_of(pipe: Any) -> dict[str, Tensor]:
    """The tensors of all networks under their official keys, on the CPU. InputError for what cannot be written."""
    state: dict[str, Tensor] = {}
    for part, prefix in prefixes(pipe.config).items():
        network = getattr(pipe, part)
        network = getattr(network, "_orig_mod", network)  # inside of what torch.compile returned
        check_plain(part, network)
        state |= {prefix + key: tensor.cpu().contiguous() for key, tensor in network.state_dict().items()}
    expected = expected_shapes(pipe.config)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if unlike := [key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key)]:
        raise InputError(
            f"a network was replaced by one of other names or sizes ({unlike[0]}): put the model's own back"
        )
    return state


def check_plain(part: str, network: nn.Module) -> None:
    """InputError unless a network has its plain weights, in memory."""
    if is_without_weights(network):
        raise InputError(f"the weights of {part} are read when it works: open the pipeline without offload to save it")
    if is_packed(network):
        raise InputError(f"{part} is packed: call pipe.unpack() first")
    active = getattr(getattr(network, "adapters", None), "active", ())
    if active:
        names = ", ".join(active)
        raise InputError(
            f"the adapters {names} are on {part}: call pipe.unload_lora_weights() first, or write the model with them "
            "by `weights-convert lora merge`"
        )


def run_settings(pipe: Any) -> dict[str, str]:
    """The metadata that keep how a model's own folder said that it is run. InputError where that was changed."""
    metadata = {} if pipe.checkpoint is None else metadata_of(pipe.checkpoint)
    if pipe.defaults != (SDXL if pipe.checkpoint is None else pipe.checkpoint.defaults):
        raise InputError(
            "pipe.defaults is not what the model's files say: set it back, and hand it over with the folder"
        )
    return {key: text for key, text in metadata.items() if key == SETTINGS_KEY}


def make_folder(file: Path) -> None:
    """InputError where a folder cannot be made, or where the file would not be what opens it."""
    folder = file.parent
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(folder) if name == FOLDER_INDEX or name.endswith(".safetensors")]
    others = sorted(set(others) - {file.name})
    if others:
        raise InputError(f"{folder} holds another model ({others[0]}): name a folder of its own")
