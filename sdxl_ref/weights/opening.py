"""Open a checkpoint of any kind: an official file, a folder in diffusers' layout, a repository, or "pocket".

This is the edge at which files from anywhere come in: whatever is wrong with one is an InputError from here on.
The kinds that are rarer than an official file are imported here when one is opened, and nowhere else.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import Checkpoint, identify, is_plain
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, read_headers, read_metadata

POCKET = {  # the small pair that is installed with this package
    f"pocket-{kind}": Path(__file__).parent.parent / "pocket" / f"pocket_{kind}.safetensors"
    for kind in ("base", "refiner")
}
WHERE = ("variant", "vae", "revision", "cache_dir", "local_files_only", "token")  # options of `open_checkpoint`


def open_checkpoint(
    name: str | Path | Checkpoint, kind: str = "", *, variant: str | None = None, vae: object = None, **hub: Any
) -> Checkpoint:
    """Open a file, a folder, a repository of the hub by its id, or "pocket"; an open checkpoint is returned as it is.

    `kind` ("base" or "refiner") says which file "pocket" is; "pocket-base" and "pocket-refiner" say it themselves.
    `variant` picks files of a folder such as `model.fp16.safetensors`. `vae` is the path of an autoencoder to use; or
    anything else, where one comes from elsewhere: a file without one opens only with it. `hub`: `revision`,
    `cache_dir`, `local_files_only`, `token`. InputError for whatever cannot be opened as a base or a refiner.
    """
    checkpoint = name if isinstance(name, Checkpoint) else open_located(locate(name, kind, variant, hub), variant, vae)
    if isinstance(vae, str | Path):
        from sdxl_ref.weights.separate_vae import with_vae

        return with_vae(checkpoint, locate(vae, checkpoint.config.kind, variant, hub), variant)
    return checkpoint


def open_located(path: Path, variant: str | None, vae: object) -> Checkpoint:
    """Open a file or folder. See `open_checkpoint`."""
    try:
        if os.path.isfile(path / FOLDER_INDEX):
            from sdxl_ref.weights.folder import open_folder

            return open_folder(path, variant)
        if variant or os.path.isdir(path):
            from sdxl_ref.weights.names import find_file

            path = find_file(path, variant)
        return open_file(path, vae is not None)
    except InputError:
        raise
    except Exception as error:  # no network can be built of such sizes
        raise InputError(f"{path}: its configuration or its shapes make no SDXL network ({error!r})") from error


def locate(name: str | Path, kind: str, variant: str | None, hub: Mapping[str, Any]) -> Path:
    """Where a model lies on this machine; a repository is downloaded if need be. InputError where there is none."""
    if os.path.exists(name):
        return Path(name)
    known = POCKET | ({"pocket": POCKET[f"pocket-{kind}"]} if kind else {})
    if str(name) in known:
        return known[str(name)]
    from sdxl_ref.weights.names import find_repository

    return find_repository(str(name), POCKET, variant, hub)


def open_file(path: Path, has_vae: bool = False) -> Checkpoint:
    """Open a safetensors file. InputError where keys, shapes or dtypes are not a model's; see `unusual.py` too.

    has_vae: an autoencoder comes from elsewhere, so the file need not hold one.
    """
    headers = read_headers(path)
    metadata = read_metadata(path)
    config = identify(headers, metadata)
    if config is not None and is_plain(config, headers, metadata):
        return Checkpoint(path, config, {key: header.shape for key, header in headers.items()}, metadata)
    from sdxl_ref.weights.unusual import open_unusual

    return open_unusual(path, headers, metadata, config, has_vae)
