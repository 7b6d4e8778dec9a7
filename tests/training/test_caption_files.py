"""Captions in text files beside the pictures, as kohya's trainers read them."""

from pathlib import Path

import pytest
from training_data import LINES, write_folder

from sdxl_ref.config import InputError
from sdxl_ref.training.image_folder import METADATA, read_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures without captions."""
    folder = write_folder(tmp_path / "pictures", LINES)
    (folder / METADATA).unlink()
    return folder


def write(folder: Path, **captions: str) -> None:
    for name, text in captions.items():
        (folder / name.replace("__", "/").replace("_", ".")).write_text(text, encoding="utf-8")


def captions(folder: Path) -> dict[str, str]:
    return {str(example.path.relative_to(folder)): example.text for example in read_folder(folder).examples}


@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_a_caption_is_the_first_line_of_the_file_beside(suffix: str, folder: Path) -> None:
    write(folder, **{f"square_{suffix}": "\ufeff  a cup, é\u2028猫 \r\n", f"more__other_{suffix}": "two cups"})
    write(folder, **{f"wide_{suffix}": "\n three cups\nand a saucer\n"})
    assert captions(folder) == {
        "more/other.png": "two cups",
        "square.png": "a cup, é\u2028猫",
        "wide.png": "three cups",
    }
    files = f"(more/other.{suffix}, square.{suffix}, wide.{suffix})"
    found = read_folder(folder)
    assert found.notes == [
        f"captions are those of 3 text files {files} beside the pictures",
        f"only the first line is the caption, as in kohya's tools, of 1 file (wide.{suffix})",
    ]
    assert [str(path.relative_to(folder)) for path in found.files] == files.strip("()").split(", ")


def test_what_is_not_used_is_told(folder: Path) -> None:
    (folder / "more").rename(folder / "10_sks cup")
    write(folder, square_txt="a cup", readme_txt="x")
    (folder / "10_sks cup" / "other.txt").write_text("two cups")
    (folder / "metadata.csv").write_text("x")
    assert read_folder(folder).notes == [
        "captions are those of 2 text files (10_sks cup/other.txt, square.txt) beside the pictures",
        "left out: 1 picture (wide.png) without a caption file",
        "not read: 1 text file (readme.txt) beside no picture of the same name",
        "the number before a folder's name (repeats) is not used: 10_sks cup",
        f"not read: 1 other table (metadata.csv); of {folder} only metadata.jsonl itself is",
    ]


def test_lines_come_before_files(folder: Path) -> None:
    write(folder, square_txt="another cup")
    write_folder(folder, LINES)
    assert captions(folder)["wide.png"] == "two cups"
    assert read_folder(folder).notes == ["not read: 1 caption file (square.txt), because there is a metadata.jsonl"]


def test_two_files_of_one_picture(folder: Path) -> None:
    write(folder, square_txt="a cup", square_caption="a cup\n")
    assert captions(folder) == {"square.png": "a cup"}
    write(folder, square_caption="another cup")
    with pytest.raises(
        InputError, match=r"square\.txt and .*square\.caption hold two captions for one picture: delete"
    ):
        read_folder(folder)


def test_files_that_hold_no_caption(folder: Path) -> None:
    write(folder, square_txt=" \n")
    with pytest.raises(InputError, match=r"square\.txt is empty: write the picture's caption into it, or delete it"):
        read_folder(folder)
    (folder / "square.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=r"could not read .*square\.txt as UTF-8 text"):
        read_folder(folder)
