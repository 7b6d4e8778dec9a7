"""Captions in text files beside the pictures, as kohya's trainers read them: `cup.png` and `cup.txt` or `cup.caption`.

Source: kohya-ss/sd-scripts, `library/train_util.py`, `DreamBoothDataset`. As there, the first line of a file is its
picture's caption. Its repeats (a folder `10_sks cup` counts ten times) and its captions from folders' names are not
used here, which a note says.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.training.examples import Example, Examples, counted, is_picture
from sdxl_ref.weights.regular import read_text

CAPTIONS = (".txt", ".caption")
REPEATED = re.compile(r"[1-9]\d*_.+")


def has_captions(files: Sequence[Path]) -> bool:
    """Whether a caption file lies beside any of the pictures among these files."""
    stems = {path.with_suffix("") for path in files if is_picture(path)}
    return any(path.suffix in CAPTIONS and path.with_suffix("") in stems for path in files)


def read_captions(folder: Path, files: Sequence[Path]) -> Examples:
    """The pictures among a folder's files that have a caption file. InputError for one that is empty or is no text."""
    texts = {path for path in files if path.suffix in CAPTIONS}
    examples = []
    read: list[Path] = []
    bare = []
    for picture in filter(is_picture, files):
        own = [path for path in map(picture.with_suffix, CAPTIONS) if path in texts]
        if own:
            examples.append(Example(picture, caption_of(own)))
            read += own
        else:
            bare.append(picture)
    notes = [f"captions are those of {counted(list(dict.fromkeys(read)), folder, 'text file')} beside the pictures"]
    if bare:
        notes.append(f"left out: {counted(bare, folder, 'picture')} without a caption file")
    if unused := sorted(texts.difference(read)):
        notes.append(f"not read: {counted(unused, folder, 'text file')} beside no picture of the same name")
    if cut := [path for path in dict.fromkeys(read) if len(lines_of(path)) > 1]:
        notes.append(f"only the first line is the caption, as in kohya's tools, of {counted(cut, folder, 'file')}")
    if repeated := repeated_folders(folder, examples):
        notes.append(f"the number before a folder's name (repeats) is not used: {', '.join(repeated)}")
    return Examples(examples, list(dict.fromkeys(read)), notes)


def caption_of(files: Sequence[Path]) -> str:
    """The caption in a picture's files. InputError where there is none, or two that differ."""
    captions = {}
    for path in files:
        lines = lines_of(path)
        if not lines:
            raise InputError(f"{path} is empty: write the picture's caption into it, or delete it")
        captions[lines[0]] = path
    if len(captions) > 1:
        names = " and ".join(str(path) for path in captions.values())
        raise InputError(f"{names} hold two captions for one picture: delete one of them")
    [caption] = captions
    return caption


def lines_of(path: Path) -> list[str]:
    """The lines of a file that hold something, without white space around them."""
    lines = read_text(path, "utf-8-sig").split("\n")  # not splitlines: a caption may hold U+2028
    return [line.strip() for line in lines if line.strip()]


def repeated_folders(folder: Path, examples: Sequence[Example]) -> list[str]:
    """The names of folders of pictures, the given one among them, that begin with a number of repeats."""
    parents = {example.path.parent for example in examples}
    names = {path.name for path in parents if path != folder} | {folder.resolve().name}
    return sorted(name for name in names if REPEATED.fullmatch(name))
