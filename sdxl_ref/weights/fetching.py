"""Official files from the hub: downloaded beside, checked by their hash, then renamed; nothing there is replaced."""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.weights.folder_saving import put_new
from sdxl_ref.weights.hub import with_one_error
from sdxl_ref.weights.identity import KNOWN_FILES
from sdxl_ref.weights.locking import locked
from sdxl_ref.weights.saving import PREFIX, explained, sync
from sdxl_ref.weights.tensor_files import sha256_of

REPOSITORIES = {
    "refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors"),
    "base": ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
}

HALF = re.compile(r".+\.[0-9a-f]{8}\.incomplete")  # what newer releases of huggingface_hub do not go on with


def fetch(kind: str, folder: Path, **options: Any) -> tuple[Path, bool]:
    """The official file of a "refiner" or "base" in a folder, and whether it was downloaded now or there already.

    InputError where another file has the name, where it cannot be had or written, and where its sha256 is another; then
    it is kept as `NAME.refused`.
    """
    repository, name = REPOSITORIES[kind]
    target = folder / name
    beside = folder / f"{PREFIX}fetch-{kind}"
    is_there = os.path.lexists(target)
    if is_there:
        check_official(target)
        if not beside.exists():
            return target, False
    elif not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {target}: expected a writable folder")
    with locked(beside, f"{folder} is being fetched into already: wait for its end"), explained(target):
        if not is_there:
            download(repository, name, beside, target, options)
        shutil.rmtree(beside, ignore_errors=True)
    return target, not is_there


def check_official(target: Path) -> None:
    """InputError where a file that is there already is not the official one."""
    expected = official_digest(target.name)
    if not target.is_file() or sha256_of(target) != expected:
        problem = f"{target} is there already, and is not the official file, whose sha256 is {expected}"
        raise InputError(f"{problem}: move it away, or choose another folder with --out")


def download(repository: str, name: str, beside: Path, target: Path, options: dict[str, Any]) -> None:
    """Download a file beside, and give it its name if it is the official one. InputError where it is not."""
    from huggingface_hub import hf_hub_download

    for half in beside.rglob("*.incomplete"):
        if HALF.fullmatch(half.name):
            half.unlink()
    file = Path(with_one_error(hf_hub_download, repository, name, local_dir=beside, **options))
    sync(file)
    digest = sha256_of(file)
    expected = official_digest(name)
    if digest == expected:
        put_new(file, target)
        return
    refused = keep_refused(file, target)
    shutil.rmtree(beside, ignore_errors=True)
    raise InputError(f"{refused} is not the official file: expected sha256 {expected}, found {digest}")


def official_digest(name: str) -> str:
    """The sha256 of an official file."""
    [digest] = (known for known, (stem, _) in KNOWN_FILES.items() if f"{stem}.safetensors" == name)
    return digest


def keep_refused(file: Path, target: Path) -> Path:
    """Put what is not the official file under a name that says so, numbered where an older one has it."""
    for number in itertools.count(1):
        refused = target.with_suffix(".refused" if number == 1 else f".refused-{number}")
        try:
            put_new(file, refused)
        except FileExistsError:
            continue
        break
    return refused
