"""The list of a batch: every form, and every line that is wrong, by its number."""

import time
from pathlib import Path

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.running.job_list import Line, read


def written(folder: Path, name: str, content: bytes) -> list[Line]:
    path = folder / name
    path.write_bytes(content)
    return list(read(path))


def test_json_lines(tmp_path: Path) -> None:
    content = '\ufeff{"prompt": "a barn", "steps": 4}\n\n  \n{"prompt": "ü\\u2028", "karras": true}'.encode()
    assert written(tmp_path, "jobs.jsonl", content) == [
        Line(1, {"prompt": "a barn", "steps": 4}),
        Line(4, {"prompt": "ü\u2028", "karras": True}),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"prompt": ', "expected a JSON object"),
        (b'["a barn"]', "expected a JSON object, found"),
        (b'{"steps": 1, "steps": 2}', "expected each option once, found 'steps' twice"),
        (b'{"strength": NaN}', "expected finite numbers, found NaN"),
        (b'{"prompt": "\xff"}', "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "expected a JSON object"),
    ],
)
def test_a_bad_line_of_json(line: bytes, error: str, tmp_path: Path) -> None:
    good, bad, last = written(tmp_path, "jobs.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert good == Line(1, {"prompt": "a"})
    assert last == Line(3, {"prompt": "b"})
    assert bad.number == 2
    assert bad.error.startswith(error)
    assert len(bad.error) < 300


def test_a_table(tmp_path: Path) -> None:
    """As a spreadsheet writes it: a mark at the beginning, quoted cells, empty ones, rows that end early."""
    content = (
        '\ufeffprompt,steps,negative prompt\r\n"a barn, red",4,\r\n\r\n"two\nlines"\r\n,,\r\na cup,2,blur\r\n'.encode()
    )
    assert written(tmp_path, "jobs.csv", content) == [
        Line(2, {"prompt": "a barn, red", "steps": "4"}),
        Line(4, {"prompt": "two\nlines"}),
        Line(7, {"prompt": "a cup", "steps": "2", "negative prompt": "blur"}),
    ]
    assert written(tmp_path, "jobs.tsv", b"prompt\tsteps\na, b\t3\n") == [Line(2, {"prompt": "a, b", "steps": "3"})]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (b"a,1,2", "expected 2 cells as in the first line, found 3"),
        (b'"a"b,1', "expected cells separated by ','"),
        (b"caf\xe9,1", "expected UTF-8, found other bytes"),
    ],
)
def test_a_bad_row_of_a_table(row: bytes, error: str, tmp_path: Path) -> None:
    lines = written(tmp_path, "jobs.csv", b"prompt,steps\na,1\n" + row + b"\nb,2\n")
    assert [line.number for line in lines] == [2, 3, 4]
    assert lines[0] == Line(2, {"prompt": "a", "steps": "1"})
    assert lines[2] == Line(4, {"prompt": "b", "steps": "2"})
    assert lines[1].error.startswith(error)


def test_a_table_names_its_columns(tmp_path: Path) -> None:
    for first in (b"prompt,prompt\n", b"prompt,\n"):
        with pytest.raises(InputError, match="expected a first line that names each column once"):
            written(tmp_path, "jobs.csv", first + b"a,b\n")


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list(read(tmp_path)) == [
        Line(1, {"image": str(tmp_path / "a.png")}), Line(2, {"image": str(tmp_path / "b.JPG")})
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture lies in"):
        list(read(tmp_path / "empty"))


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not read the job list .*: No such file"):
        list(read(tmp_path / "jobs.jsonl"))


def test_a_bad_line_is_told_in_one_printable_line(tmp_path: Path) -> None:
    [bad] = written(tmp_path, "jobs.jsonl", b'["' + "\u2028\x9b".encode() + b'"]')
    assert bad.error.isprintable()
    _, bad = written(tmp_path, "jobs.tsv", b'a\tb\nx\ty\n"c"d\te\n')
    assert bad.error.isprintable()


def test_a_line_of_many_names_is_read_at_once(tmp_path: Path) -> None:
    names = ", ".join(f'"n{i}": 1' for i in range(100_000))
    began = time.perf_counter()
    [line] = written(tmp_path, "jobs.jsonl", f"{{{names}}}".encode())
    assert len(line.options) == 100_000
    assert time.perf_counter() - began < 5
