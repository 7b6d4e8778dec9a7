"""Open models by name: the pair that is installed with this package, or a repository on the Hugging Face hub.

The latter through huggingface_hub, whose cache, settings (`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME`, tokens) and
resuming of downloads apply as everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sdxl_ref.checkpoint import KNOWN_FILES, PICKLES, sha256_of
from sdxl_ref.config import InputError
from sdxl_ref.folder import INDEX, STEMS

REPOSITORIES = {
    "refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors"),
    "base": ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
EXAMPLE = REPOSITORIES["refiner"][0]
ID = re.compile(r"[\w.-]+/[\w.-]+")


POCKET = {f"pocket-{kind}": Path(__file__).parent / "pocket" / f"pocket_{kind}.safetensors" for kind in REPOSITORIES}


def resolve(name: str | Path, kind: str = "", *, variant: str | None = None, **options: Any) -> Path:
    """A local file or folder as it is; "pocket" -> the installed file; a repository's id -> the folder that holds its
    snapshot, downloaded if need be.

    `kind` ("base" or "refiner") says which file "pocket" is; "pocket-base" and "pocket-refiner" say it themselves.
    `options`: `revision`, `cache_dir`, `local_files_only`, `token`. Only configurations and the safetensors files of
    the variant are fetched. InputError where there is neither, or the download fails.
    """
    path, text = Path(name), str(name)
    if os.path.exists(path):
        return path
    if text == "pocket" and not kind:
        raise InputError(f"the pocket pair is two models: expected one of {', '.join(POCKET)}, found pocket")
    if pocket := POCKET.get(f"pocket-{kind}" if text == "pocket" else text):
        return pocket
    if not ID.fullmatch(text) or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"no such checkpoint: {name}: expected a file, a folder, pocket or a repository as {EXAMPLE}")
    from huggingface_hub import snapshot_download

    return Path(_told(snapshot_download, text, allow_patterns=patterns(variant), **options))


def patterns(variant: str | None) -> list[str]:
    """What a folder's reader needs."""
    middle = f".{variant}" if variant else ""
    weights = [f"{stem}{middle}{shard}.safetensors" for stem in STEMS for shard in ("", "-*-of-*")]
    indices = [f"{stem}.safetensors.index{middle}.json" for stem in STEMS]
    return [INDEX, *(f"{part}/{name}" for part in PARTS for name in ("config.json", *weights, *indices))]


def fetch(kind: str, folder: Path, **options: Any) -> Path:
    """Download the official file of a "refiner" or "base" into a folder, and check its sha256."""
    from huggingface_hub import hf_hub_download

    repository, name = REPOSITORIES[kind]
    path = Path(_told(hf_hub_download, repository, name, local_dir=folder, **options))
    found = sha256_of(path)
    if KNOWN_FILES.get(found, ("",))[0] != name.removesuffix(".safetensors"):
        refused = path.rename(path.with_suffix(".refused"))  # not under the name of what it is not
        [expected] = (known for known, (stem, _) in KNOWN_FILES.items() if f"{stem}.safetensors" == name)
        raise InputError(f"{refused} is not the official file: expected sha256 {expected}, found {found}")
    return path


def _told(download: Any, *arguments: Any, **options: Any) -> str:
    """Errors of the hub as one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(download(*arguments, **options))
    except LocalEntryNotFoundError as error:
        raise InputError(f"{arguments[0]} is neither in the cache nor to be had from the hub: {error}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"could not get {arguments[0]} from the hub: {error}") from error
