"""Open a checkpoint of any kind: an official file, a folder in diffusers' layout, a repository, or "pocket".

This is the edge at which files from anywhere come in: whatever is wrong with one is an InputError from here on.
The kinds that are rarer than an official file are imported here when one is opened, and nowhere else.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY, EXTRAS, Checkpoint, Shapes, check
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, PICKLES, is_pickle, read_headers, read_metadata

POCKET = {  # the small pair that is installed with this package
    f"pocket-{kind}": Path(__file__).parent.parent / "pocket" / f"pocket_{kind}.safetensors"
    for kind in ("base", "refiner")
}
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
WHERE = ("variant", "revision", "cache_dir", "local_files_only", "token")  # options of `open_checkpoint`
EXAMPLE = "stabilityai/stable-diffusion-xl-refiner-1.0"


def open_checkpoint(
    name: str | Path | Checkpoint, kind: str = "", *, variant: str | None = None, **hub: Any
) -> Checkpoint:
    """Open a file, a folder, a repository of the hub by its id, or "pocket"; an open checkpoint is returned as it is.

    `kind` ("base" or "refiner") says which file "pocket" is; "pocket-base" and "pocket-refiner" say it themselves.
    `variant` picks files of a folder such as `model.fp16.safetensors`; `hub`: `revision`, `cache_dir`,
    `local_files_only`, `token`. InputError for whatever cannot be opened as a base or a refiner.
    """
    if isinstance(name, Checkpoint):
        return name
    path = locate(name, kind, variant, hub)
    try:
        if os.path.isfile(path / FOLDER_INDEX):
            from sdxl_ref.weights.folder import open_folder

            return open_folder(path, variant)
        return open_file(find_file(path))
    except InputError:
        raise
    except Exception as error:  # no network can be built of such sizes
        raise InputError(f"{path}: its configuration or its shapes make no SDXL network ({error!r})") from error


def locate(name: str | Path, kind: str, variant: str | None, hub: Mapping[str, Any]) -> Path:
    """Where a model lies on this machine; a repository is downloaded if need be. InputError where there is none."""
    path = Path(name)
    text = str(name)
    if os.path.exists(path):
        return path
    if text == "pocket" and not kind:
        raise InputError(f"the pocket pair is two models: expected one of {', '.join(POCKET)}, found pocket")
    if text == "pocket":
        text = f"pocket-{kind}"
    if text in POCKET:
        return POCKET[text]
    if not REPOSITORY.fullmatch(text) or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"no such checkpoint: {name}: expected a file, a folder, pocket or a repository as {EXAMPLE}")
    from sdxl_ref.weights.hub import download

    return download(text, variant, **hub)


def find_file(path: Path) -> Path:
    """A file itself, or the one safetensors file of a folder. InputError for a pickle, or where there is none."""
    if is_pickle(path):
        raise InputError(
            f"{path} is a pickle, which can run any code when opened: expected a safetensors file; if you trust it, "
            "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], OUT)"
        )
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise InputError(f"no such checkpoint: {path}")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(f"expected one .safetensors file in the folder {path}, found {names}: name the file")
    return files[0]


def open_file(path: Path) -> Checkpoint:
    """Open a safetensors file in the official layout. InputError where keys, shapes or dtypes are not a model's."""
    headers = read_headers(path)
    shapes = {key: header.shape for key, header in headers.items()}
    metadata = read_metadata(path)
    config, note = identify(shapes, metadata, path)
    check(config, shapes, path)
    whole = [key for key, header in headers.items() if "F" not in header.dtype and not EXTRAS.fullmatch(key)]
    if whole:  # I64, U8, BOOL, …
        raise InputError(f"{path}: expected weights in floating point, found {len(whole)} others, as {whole[0]}")
    return Checkpoint(path, config, shapes, metadata, note)


def identify(shapes: Shapes, metadata: Mapping[str, str], path: Path) -> tuple[ModelConfig, str]:
    """The configuration that a file carries, or else that its shapes tell, with a note on what was assumed."""
    if CONFIG_KEY in metadata:
        return ModelConfig.from_json(metadata[CONFIG_KEY]), ""
    label = "model.diffusion_model.label_emb.0.0.weight"
    if label not in shapes:
        stems = ", ".join(sorted({key.split(".")[0] for key in shapes})[:6]) or "no tensors"
        raise InputError(f"{path} is no SDXL checkpoint in the official layout: no {label}, found keys of {stems}")
    for config in (REFINER_1_0, BASE_1_0):
        if shapes[label] == (4 * config.unet.model_channels, config.unet.adm_in_channels):
            return config, ""
    from sdxl_ref.weights.identify import config_from_shapes

    config = config_from_shapes(shapes)
    return config, f"no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
