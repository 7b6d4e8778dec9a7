"""A folder of captioned pictures: its lines are read in their order, and a bad one is named."""

import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from training_data import LINES, speckled, write_folder

from sdxl_ref.config import InputError
from sdxl_ref.training.image_folder import METADATA, read_folder


def test_lines_are_read_in_their_order(tmp_path: Path) -> None:
    odd = '{"file_name": "wide.png", "text": "a\u2028cup \\u00e9", "aesthetic_score": null, "more": [1]}'
    found = read_folder(write_folder(tmp_path, ["\ufeff" + json.dumps(LINES[0]), "", "  ", odd, *LINES[2:]]))
    examples = found.examples
    assert found.notes == [f"not used: the columns more of {METADATA}"]
    assert [example.path.relative_to(tmp_path).as_posix() for example in examples] == [
        "square.png",
        "wide.png",
        "more/other.png",
        "square.png",
    ]
    assert [example.text for example in examples] == ["a cup", "a\u2028cup é", "a cup", "the same cup"]
    assert [example.aesthetic_score for example in examples] == [7.0, None, None, 5.5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name': 'square.png'}", r"line 2: expected JSON as .*found \"\{'file_name"),
        ("[" * 100_000, "line 2: expected JSON"),
        ('["square.png", "a cup"]', "line 2: expected JSON"),
        ({"text": "a cup"}, "line 2: expected file_name, a text, found None"),
        ({"file_name": "", "text": "a cup"}, "line 2: expected file_name, a text, found ''"),
        ({"file_name": 3, "text": "a cup"}, "line 2: expected file_name, a text, found 3"),
        ({"file_name": "square.png"}, "line 2: expected text, a text, found None"),
        ({"file_name": "square.png", "text": ["a cup"]}, r"line 2: expected text, a text, found \['a cup'\]"),
        ({"file_name": "none.png", "text": ""}, "line 2: no such picture in .*'none.png'"),
        ({"file_name": "more", "text": ""}, "line 2: no such picture"),
        ({"file_name": "a\0b", "text": ""}, "line 2: no such picture"),
        ({"file_name": "x" * 5000, "text": ""}, "line 2: no such picture"),
        ({"file_name": "../outside.png", "text": ""}, "line 2: expected a file_name inside .*found '../outside.png'"),
        ({"file_name": "more/../../outside.png", "text": ""}, "line 2: expected a file_name inside"),
        ({"file_name": "/outside.png", "text": ""}, "line 2: expected a file_name inside .*found '/outside.png'"),
        ({**LINES[0], "aesthetic_score": "6"}, "line 2: expected a finite number as aesthetic_score, found '6'"),
        ({**LINES[0], "aesthetic_score": True}, "line 2: expected a finite number as aesthetic_score, found True"),
        ({**LINES[0], "aesthetic_score": math.nan}, "line 2: expected a finite number as aesthetic_score, found nan"),
        ({**LINES[0], "aesthetic_score": -math.inf}, "line 2: expected a finite number as aesthetic_score, found -inf"),
        ({**LINES[0], "aesthetic_score": 10**400}, "line 2: expected a finite number as aesthetic_score, found 1000"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    speckled(0, 8, 8).save(tmp_path / "outside.png")
    folder = write_folder(tmp_path / "data", [LINES[0], line])
    with pytest.raises(InputError, match=message) as error:
        read_folder(folder)
    assert str(folder / METADATA) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder of pictures: .*none"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match=r"expected pictures in .*, found none \(\.png, .*: name the folder"):
        read_folder(tmp_path)
    speckled(0, 8, 8).save(tmp_path / "cup.png")
    with pytest.raises(InputError, match=f"expected {METADATA} in .*write a line for each picture"):
        read_folder(tmp_path)
    for text in ("", "\n \n"):
        (tmp_path / METADATA).write_text(text)
        with pytest.raises(InputError, match=f"{METADATA} is empty: write a line"):
            read_folder(tmp_path)
    (tmp_path / METADATA).write_bytes(b'{"file_name": "\xff\xfe"}')
    with pytest.raises(InputError, match="as UTF-8 text"):
        read_folder(tmp_path)


# --- other tools' columns, separators and tables ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"file_name": "square.png", "caption": "a cup"}, "rename the column 'caption' to 'text' in every line"),
        ({"file_name": "square.png", "prompt": "a cup"}, "rename the column 'prompt' to 'text' in every line"),
        ({"file_name": "square.png", "Text": "a cup"}, "rename the column 'Text' to 'text' in every line"),
        ({"image": "square.png", "text": "a cup"}, "rename the column 'image' to 'file_name' in every line"),
        ({"filename": "square.png", "text": "a cup"}, "rename the column 'filename' to 'file_name' in every line"),
        ({"file-name": "square.png", "text": "a cup"}, "rename the column 'file-name' to 'file_name' in every line"),
        ({"file_name": "square.png", "words": "a cup"}, "write it as in {"),
        ({"file_name": r"more\other.png", "text": ""}, r": 'more\\other.png': write it with forward slashes"),
        ({"file_name": r"C:\pictures\cup.png", "text": ""}, "write it with forward slashes, relative to the folder"),
        ({"file_name": "square.png", "text": "", "aesthetic_score": "6"}, "'6': write it without quotes"),
    ],
)
def test_a_fault_of_every_line_comes_with_its_remedy(fields: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_folder(write_folder(tmp_path, [fields]))
    assert remedy in str(error.value)
    assert "line 1" in str(error.value)


CSV = 'file_name,text,aesthetic_score\nsquare.png,"a cup, red",6.5\nmore/other.png,"a ""cup""; é",\n'
TABLES = {
    "plain": CSV.encode(),
    "Excel's mark and line ends": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
    "semicolons and decimal commas": (
        'file_name;text;aesthetic_score\nsquare.png;a cup, red;6,5\nmore/other.png;"a ""cup""; é";\n'.encode()
    ),
    "tabs": CSV.replace(",", "\t").replace("\t red", ", red").encode(),
}


@pytest.mark.parametrize("name", ["metadata.csv", "my table's.CSV"])
@pytest.mark.parametrize("table", TABLES)
def test_the_remedy_for_a_csv_works_when_it_is_pasted(table: str, name: str, tmp_path: Path) -> None:
    """From anywhere, as it is printed."""
    folder = write_folder(tmp_path / "my pictures", [])
    (folder / METADATA).unlink()
    (folder / name).write_bytes(TABLES[table])
    with pytest.raises(InputError, match=r"found neither, but .*: with its columns named") as error:
        read_folder(folder)
    remedy = str(error.value).partition("file_name and text, ")[2]
    subprocess.run(remedy, shell=True, check=True, cwd=tmp_path)
    found = read_folder(folder)
    assert [example.text for example in found.examples] == ["a cup, red", 'a "cup"; é']
    assert [example.aesthetic_score for example in found.examples] == [6.5, None]


def test_a_csv_without_scores_and_with_lines_in_a_caption(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [])
    (folder / METADATA).unlink()
    (folder / "metadata.csv").write_text('file_name,text\nsquare.png,"a\ncup"\n')
    with pytest.raises(InputError) as error:
        read_folder(folder)
    subprocess.run(str(error.value).partition("file_name and text, ")[2], shell=True, check=True)
    found = read_folder(folder)
    assert [example.text for example in found.examples] == ["a\ncup"]
    assert "not read: 1 other table (metadata.csv); of " in found.notes[1]


@pytest.mark.parametrize("name", ["Metadata.jsonl", "captions.jsonl", "metadata.jsonl.txt"])
def test_lines_under_another_name_are_named(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LINES)
    (folder / METADATA).rename(folder / name)
    with pytest.raises(InputError, match=f"found neither, but {name}: rename it to {METADATA}"):
        read_folder(folder)


@pytest.mark.parametrize("table", ["captions.json", "metadata.parquet", "captions.tsv"])
def test_another_table_is_named(table: str, tmp_path: Path) -> None:
    (tmp_path / table).write_text("{}")
    with pytest.raises(InputError, match=f"found neither, but {table}: write what it says as lines such as"):
        read_folder(tmp_path)


def test_lines_in_a_folder_below_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", LINES)
    with pytest.raises(InputError, match=r"found neither, but .*train/metadata\.jsonl: name its folder"):
        read_folder(tmp_path)


# --- what is not used -------------------------------------------------------------------------------------------------


def test_nothing_is_told_where_all_is_used(tmp_path: Path) -> None:
    assert read_folder(write_folder(tmp_path, LINES)).notes == []


def test_each_kind_of_what_is_not_used_is_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{**LINES[0], "licence": "CC0", "width": 100}, LINES[2]])
    write_folder(folder / "below", LINES)
    for name in ("a.JPG", ".hidden.png", ".cache/b.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    for name in ("square.txt", "more/other.caption", "notes.txt"):
        (folder / name).write_text("a cup")
    (folder / "loop").symlink_to(folder)
    assert read_folder(folder).notes == [
        "left out: 5 pictures (a.JPG, below/more/other.png, below/square.png, …) without a line in metadata.jsonl",
        "not used: the columns licence, width of metadata.jsonl",
        "not read: 2 caption files (more/other.caption, square.txt), because there is a metadata.jsonl",
        f"not read: 1 other table (below/metadata.jsonl); of {folder} only metadata.jsonl itself is",
    ]


def test_a_picture_that_is_named_through_a_link_is_used(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [*LINES, {"file_name": "link.png", "text": "again"}])
    (folder / "link.png").symlink_to("square.png")
    assert read_folder(folder).notes == []


@pytest.mark.sweep
@pytest.mark.parametrize("captions", ["lines", "files"])
def test_a_folder_of_10000_pictures_is_read_in_seconds(captions: str, tmp_path: Path) -> None:
    """2 to 4 s on two cores that others use too; a pair of loops over all would take minutes."""
    for i in range(10_000):
        (tmp_path / f"{i}.png").touch()
        if captions == "files":
            (tmp_path / f"{i}.txt").write_text("a cup")
    if captions == "lines":
        lines = [json.dumps({"file_name": f"{i}.png", "text": "a cup"}) for i in range(10_000)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    began = time.perf_counter()
    assert len(read_folder(tmp_path).examples) == 10_000
    assert time.perf_counter() - began < 20
