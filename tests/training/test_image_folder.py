"""A folder of captioned pictures: its lines are read in their order, and a bad one is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_data import LINES, speckled, write_folder

from sdxl_ref.config import InputError
from sdxl_ref.training.image_folder import METADATA, read_folder


def test_lines_are_read_in_their_order(tmp_path: Path) -> None:
    odd = '{"file_name": "wide.png", "text": "a\u2028cup \\u00e9", "aesthetic_score": null, "more": [1]}'
    examples = read_folder(write_folder(tmp_path, ["\ufeff" + json.dumps(LINES[0]), "", "  ", odd, *LINES[2:]]))
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
    with pytest.raises(InputError, match=f"expected {METADATA} in .*write a line for each picture"):
        read_folder(tmp_path)
    for text in ("", "\n \n"):
        (tmp_path / METADATA).write_text(text)
        with pytest.raises(InputError, match=f"{METADATA} is empty: write a line"):
            read_folder(tmp_path)
    (tmp_path / METADATA).write_bytes(b'{"file_name": "\xff\xfe"}')
    with pytest.raises(InputError, match="as UTF-8 text"):
        read_folder(tmp_path)
