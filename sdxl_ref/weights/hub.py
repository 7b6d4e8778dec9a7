"""Repositories on the Hugging Face hub, through huggingface_hub.

Its cache, settings (`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME`, tokens) and resuming of downloads apply as everywhere.
"""

from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import KNOWN_FILES, PARTS
from sdxl_ref.weights.folder import EXTRAS_FILE, STEMS
from sdxl_ref.weights.folder_config import PADDING
from sdxl_ref.weights.folder_scheduler import SCHEDULER_CONFIG
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, sha256_of

REPOSITORIES = {
    "refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors"),
    "base": ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
}


def download(repository: str, variant: str | None, **options: Any) -> Path:
    """The folder that holds a repository's snapshot, downloaded if need be.

    Only configurations and the safetensors files of the variant are fetched. `options`: `revision`, `cache_dir`,
    `local_files_only`, `token`. InputError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    return Path(_with_one_error(snapshot_download, repository, allow_patterns=patterns(variant), **options))


def patterns(variant: str | None) -> list[str]:
    """What a folder's reader needs."""
    middle = f".{variant}" if variant else ""
    weights = [f"{stem}{middle}{shard}.safetensors" for stem in STEMS for shard in ("", "-*-of-*")]
    indices = [f"{stem}.safetensors.index{middle}.json" for stem in STEMS]
    of_parts = [f"{part}/{name}" for part in PARTS for name in ("config.json", *weights, *indices)]
    tokenizers = [f"{name}/tokenizer_config.json" for name in PADDING]
    return [FOLDER_INDEX, SCHEDULER_CONFIG, EXTRAS_FILE, *tokenizers, *of_parts]


def fetch(kind: str, folder: Path, **options: Any) -> Path:
    """Download the official file of a "refiner" or "base" into a folder, and check its sha256."""
    from huggingface_hub import hf_hub_download

    repository, name = REPOSITORIES[kind]
    path = Path(_with_one_error(hf_hub_download, repository, name, local_dir=folder, **options))
    digest = sha256_of(path)
    if KNOWN_FILES.get(digest, ("",))[0] != name.removesuffix(".safetensors"):
        refused = path.rename(path.with_suffix(".refused"))  # not under the name of what it is not
        [expected] = (known for known, (stem, _) in KNOWN_FILES.items() if f"{stem}.safetensors" == name)
        raise InputError(f"{refused} is not the official file: expected sha256 {expected}, found {digest}")
    return path


def _with_one_error(download: Any, *arguments: Any, **options: Any) -> str:
    """Errors of the hub as one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(download(*arguments, **options))
    except LocalEntryNotFoundError as error:
        raise InputError(f"{arguments[0]} is neither in the cache nor to be had from the hub: {error}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"could not get {arguments[0]} from the hub: {error}") from error
