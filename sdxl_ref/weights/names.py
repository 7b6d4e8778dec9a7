"""What a name stands for that is not simply a file: a folder's one file, a repository of the hub, or nothing.

Loaded only for such a name.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.hub import download
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, PICKLES

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
EXAMPLE = "stabilityai/stable-diffusion-xl-refiner-1.0"


def find_repository(name: str, known: Mapping[str, Path], variant: str | None, hub: Mapping[str, Any]) -> Path:
    """The folder of a repository, downloaded if need be. InputError for a name that is none of `known` either."""
    if name == "pocket":
        raise InputError(f"the pocket pair is two models: expected one of {', '.join(known)}, found pocket")
    path = Path(name)
    if not REPOSITORY.fullmatch(name) or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"no such checkpoint: {name}: expected a file, a folder, pocket or a repository as {EXAMPLE}")
    return download(name, variant, **hub)


def find_file(path: Path, variant: str | None = None) -> Path:
    """What is no folder as it is, or the one safetensors file of a folder. InputError where there is not one.

    A warning where a variant is asked for: such files have none.
    """
    if variant:
        warnings.warn(f"the variant {variant!r} is not used: {path} is no folder of a pipeline's parts", stacklevel=2)
    if not path.is_dir():
        return path  # `open_tensors` says what is wrong with it
    refuse_cache(path)
    if (path / "unet").is_dir() and (path / "vae").is_dir():
        raise InputError(f"{path} lacks {FOLDER_INDEX}, which says what its parts are: complete the folder")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(f"expected one .safetensors file in the folder {path}, found {names}: name the file")
    return files[0]


def refuse_cache(path: Path) -> None:
    """InputError where a folder is the hub's cache, of one repository or of all: it holds models, and is none."""
    snapshots = [folder for folder in path.glob("snapshots/*") if folder.is_dir()]
    if snapshots:
        repository = path.name.removeprefix("models--").replace("--", "/")
        newest = max(snapshots, key=lambda folder: folder.stat().st_mtime)
        raise InputError(f"{path} is the hub's cache of {repository}: expected a model, name a snapshot as {newest}")
    if caches := sorted(folder.name for folder in path.glob("models--*") if folder.is_dir()):
        names = ", ".join(cache.removeprefix("models--").replace("--", "/") for cache in caches[:4])
        raise InputError(f"{path} is the hub's cache: expected a model, found those of {names}: name one of them")
