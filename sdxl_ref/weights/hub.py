"""Repositories on the Hugging Face hub, through huggingface_hub.

Its cache, settings (`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME`, tokens) and resuming of downloads apply as everywhere.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import PARTS
from sdxl_ref.weights.folder import EXTRAS_FILE, choose
from sdxl_ref.weights.folder_scheduler import SCHEDULER_CONFIG
from sdxl_ref.weights.folder_tokenizer import FILES, PADDING
from sdxl_ref.weights.hub_limits import limits
from sdxl_ref.weights.tensor_files import FOLDER_INDEX


def download(repository: str, variant: str | None, **options: Any) -> Path:
    """The folder that holds a repository's snapshot, downloaded if need be.

    Of a pipeline's folder only the configurations and the weights of the variant are fetched, of any other repository
    the one safetensors file at its root. `options`: `revision`, `cache_dir`, `local_files_only`, `token`. InputError
    where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    wanted = wanted_files(repository, listing(repository, **options), variant)
    return Path(with_one_error(snapshot_download, repository, allow_patterns=wanted, **options))


def listing(
    repository: str, revision: Any = None, token: Any = None, local_files_only: bool = False, **_: Any
) -> list[str]:
    """The names of a repository's files; none where they cannot be had, of which the download has more to say."""
    from huggingface_hub import list_repo_files

    if local_files_only:
        return []
    try:
        with limits():
            return list(list_repo_files(repository, revision=revision, token=token))
    except InputError:
        raise
    except Exception:  # offline, no such repository, …
        return []


def wanted_files(repository: str, names: Sequence[str], variant: str | None) -> list[str]:
    """What of a repository is needed to open it. InputError where it holds no model that can be opened."""
    if not names:
        return [FOLDER_INDEX]
    if FOLDER_INDEX not in names:
        files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        if len(files) != 1:
            found = ", ".join(files[:6]) or "none"
            raise InputError(
                f"{repository} has no {FOLDER_INDEX}: expected one .safetensors file at its root, found {found}: "
                "download the one you want, and name it"
            )
        return files
    fixed = [FOLDER_INDEX, SCHEDULER_CONFIG, EXTRAS_FILE, *(f"{name}/{file}" for name in PADDING for file in FILES)]
    wanted = [name for name in fixed if name in names]
    for part in PARTS:
        own = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        weights, _ = choose(own, variant)
        for index in [name for name in weights if name.endswith(".json")]:
            whole = index.replace(".safetensors.index", "").removesuffix(".json")  # `model.fp16`, as its shards begin
            weights += [name for name in own if fnmatch(name, f"{whole}-*-of-*.safetensors")]
        wanted += [f"{part}/{name}" for name in weights]
        wanted.append(f"{part}/config.json")
    return wanted


def with_one_error(download: Any, *arguments: Any, **options: Any) -> str:
    """The path that a download returns. InputError in one line for what the hub does wrong, or not in time."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with limits():
            return str(download(*arguments, **options))
    except LocalEntryNotFoundError as error:
        raise InputError(f"{arguments[0]} is neither in the cache nor to be had from the hub: {error}") from error
    except Exception as error:  # huggingface_hub's, its HTTP client's, the system's
        raise InputError(f"could not get {arguments[0]} from the hub: {str(error) or repr(error)}") from error
