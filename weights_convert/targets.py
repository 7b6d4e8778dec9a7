"""What is asked of a target before anything is written, and what of an old one stays."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.folder_saving import MEANWHILE, new_folder, put_new, replacing_folder
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.saving import make_permanent, replacing
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, PICKLES

PART_CONFIG = "config.json"  # what makes a folder that of one part
WEIGHTS = r"(diffusion_pytorch_model|pytorch_model|model)[.-].*(safetensors|bin|json)"  # of any variant, sharded or not
PART = re.compile(rf"config\.json|{WEIGHTS}|{re.escape(EXTRAS_FILE)}")
TOKENIZER = re.compile(r"(vocab|special_tokens_map|tokenizer_config|tokenizer|added_tokens)\.json|merges\.txt")
NAMED = {  # the files that diffusers' layout names, by subfolder
    "": re.compile(rf"{re.escape(FOLDER_INDEX)}|{re.escape(EXTRAS_FILE)}"),
    **dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), PART),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), TOKENIZER),
    "scheduler": re.compile(r"scheduler_config\.json"),
}


def check_target(target: Path, size: int, force: bool, is_folder: bool = False) -> None:
    """InputError unless `size` bytes can be written there, and nothing is there yet (or `force` is given).

    As one safetensors file, or as the files of a folder. Deletes what killed processes left beside it, so that nothing
    piles up.
    """
    check_name(target)
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {target}: expected an existing, writable folder {folder}")
    clear(folder)  # first: it may put back what was there
    check_kind(target, is_folder)
    if target.exists() and not force:
        raise InputError(f"{target} is there already: name another target, or give --force to replace it")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{target} needs {size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def check_name(target: Path) -> None:
    """InputError for a name that is none, or that the system does not take."""
    if target.name in ("", ".."):
        raise InputError(f"expected a target with a name of its own, found {target}: name the file or folder")
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def check_kind(target: Path, is_folder: bool) -> None:
    """InputError where a file, or a folder, cannot have this name; or where `--force` would not replace what has it."""
    if target.is_symlink() or (target.exists() and not (target.is_file() or target.is_dir())):
        raise InputError(f"{target} is a link or a device, no file or folder: name another target")
    is_model = any((target / name).is_file() for name in (FOLDER_INDEX, PART_CONFIG))
    if target.is_dir() and any(target.iterdir()) and not is_model:
        raise InputError(f"{target} is a folder that holds other things than a model: name another target")
    if is_folder and target.is_file():
        raise InputError(f"{target} is a file: name a folder for diffusers' layout")
    if not is_folder and target.is_dir():
        raise InputError(f"{target} is a folder: name a file for the official layout")
    if not is_folder:
        check_suffix(target)


def check_suffix(target: Path) -> None:
    """InputError for the name of a file by which other tools would take it for another format, such as a pickle."""
    if target.suffix.lower() in PICKLES:
        found = f"found {target.suffix!r}, which other tools would open as a pickle"
        raise InputError(f"cannot write {target}: expected a name that ends in .safetensors, {found}")


def check_apart(target: Path, read: Iterable[Path], is_folder: bool) -> None:
    """InputError where a target is one of the files or folders that are read, or is there already in such a folder.

    A target that is a folder may not lie in one that is read, nor hold what is read.
    """
    place = Path(os.path.realpath(target))
    for path in read:
        real = Path(os.path.realpath(path))
        if place == real or (os.path.exists(place) and os.path.exists(real) and place.samefile(real)):
            raise InputError(f"{target} is there already, and is what is read: name another target")
        is_inside = real in place.parents and (is_folder or os.path.lexists(place))
        if is_inside or place in real.parents:
            raise InputError(f"{target} and {path} lie one inside the other: name another target")


# --- files ----------------------------------------------------------------------------------------------------------


def writing_file(target: Path, force: bool) -> AbstractContextManager[Path]:
    """`replacing` with `force`; without, InputError where something has come to the target meanwhile."""
    return replacing(target) if force else replacing(target, put_new_file)


def put_new_file(new: Path, target: Path, rights: int) -> None:
    """Give a whole file its name in one step. InputError where something has come there meanwhile."""
    make_permanent(new, rights)
    try:
        put_new(new, target)
    except FileExistsError as error:
        raise InputError(MEANWHILE.format(target=target)) from error


# --- folders --------------------------------------------------------------------------------------------------------


def writing_folder(
    target: Path, force: bool, named: Callable[[Path], bool], kept: list[str]
) -> AbstractContextManager[Path]:
    """`replacing_folder` with `force`; without, InputError where something has come to the target meanwhile.

    Of a folder that is replaced all stays but what is `named`, by its path in the folder; `kept` gets the names.
    """
    return replacing_folder(target, partial(carry_over, named=named, kept=kept)) if force else new_folder(target)


def named_in_pipeline(path: Path) -> bool:
    """Whether diffusers' layout has a file of this name, whatever the model: of any variant, sharded or not."""
    folder = path.parent.as_posix() if path.parent.parts else ""
    return folder in NAMED and NAMED[folder].fullmatch(path.name) is not None


def named_in_part(path: Path) -> bool:
    """The same for the folder of one part."""
    return not path.parent.parts and PART.fullmatch(path.name) is not None


def carry_over(old: Path, new: Path, named: Callable[[Path], bool], kept: list[str]) -> None:
    """Have a new folder hold what the old one does and the layout does not name: the same files, by another link."""
    shutil.copymode(old, new)
    carry_below(Path(), old, new, named, kept)


def carry_below(below: Path, old: Path, new: Path, named: Callable[[Path], bool], kept: list[str]) -> None:
    """The same for the subfolder `below`."""
    for path in sorted((old / below).iterdir()):
        relative = below / path.name
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and not below.parts and path.name in NAMED:
            carry_below(relative, old, new, named, kept)
        elif not named(relative):
            target = new / relative
            target.parent.mkdir(exist_ok=True)
            if is_folder:
                shutil.copytree(path, target, symlinks=True, copy_function=link_or_copy)
            else:
                link_or_copy(path, target)
            kept.append(relative.as_posix())


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under a second name; a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
