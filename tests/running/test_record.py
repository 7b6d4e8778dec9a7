"""The record of a batch: what it holds after any stop, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.running.record import Record

SETTINGS = {"threads": 2}


def opened(folder: Path, name: str = "") -> Record:
    record = Record(folder, name)
    record.begin(SETTINGS)
    return record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def finished(folder: Path, *jobs: str, name: str = "") -> None:
    """A process that finishes these jobs, one picture each."""
    record = opened(folder, name)
    for job in jobs:
        record.finish(job, [f"{job}.png"], {"prompt": "a barn"})
    record.close()


def test_finished_jobs_are_known_to_the_next_process(tmp_path: Path) -> None:
    finished(tmp_path, "a", "b")
    finished(tmp_path, "c")
    record = opened(tmp_path)
    assert record.done == {"a": ["a.png"], "b": ["b.png"], "c": ["c.png"]}
    assert [entry for entry in lines(tmp_path) if "format" in entry] == [{"format": 1, "threads": 2}]
    assert record.settings == SETTINGS


def test_a_job_whose_picture_is_gone_is_not_done(tmp_path: Path) -> None:
    finished(tmp_path, "a", "b")
    (tmp_path / "a.png").touch()
    record = Record(tmp_path)
    assert [record.is_done(job) for job in "abc"] == [True, False, False]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    """At every byte: what stood before it counts, and what is added afterwards."""
    finished(tmp_path, "a", "b")
    path = tmp_path / "record.jsonl"
    whole = path.read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        finished(tmp_path, "c")
        record = Record(tmp_path)
        expected = {"c"} | ({"a"} if size >= len(first + second) - 1 else set())
        assert set(record.done) == expected | ({"b"} if size >= len(whole) - 1 else set())
        assert record.settings == SETTINGS


def test_several_processes_read_each_other(tmp_path: Path) -> None:
    finished(tmp_path, "a", name="0-of-2")
    finished(tmp_path, "b", name="1-of-2")
    record = opened(tmp_path)
    assert set(record.done) == {"a", "b"}
    finished(tmp_path, "c", name="0-of-2")
    assert "c" not in record.done
    record.refresh()
    assert set(record.done) == {"a", "b", "c"}
    record.finish("d", ["d.png"], {})
    record.refresh()
    assert record.done["d"] == ["d.png"]
    record.close()
    names = ["record-0-of-2.jsonl", "record-1-of-2.jsonl", "record.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.fail("a", "the mask is black")
    record.fail("b", "no such file")
    record.finish("b", ["b.png"], {})
    record.close()
    assert Record(tmp_path).failed == {"a": "the mask is black"}
    assert Record(tmp_path).done == {"b": ["b.png"]}


def test_a_batch_goes_on_as_it_began(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    with pytest.raises(InputError, match=r"holds a batch with another threads \(2\), expected 1: go on with the same"):
        Record(tmp_path).begin({"threads": 1})
    (tmp_path / "record.jsonl").write_text('{"format": 2}\n')
    with pytest.raises(InputError, match="holds a batch of another version of this package"):
        Record(tmp_path)


def test_weights_keep_their_hash(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.check_weights({"refiner.safetensors": "0" * 64})
    record.check_weights({"refiner.safetensors": "0" * 64})  # written once
    record.close()
    assert sum("weights" in entry for entry in lines(tmp_path)) == 1
    record = opened(tmp_path)
    with pytest.raises(InputError, match=r"refiner.safetensors is not the file that this batch began with"):
        record.check_weights({"refiner.safetensors": "1" * 64})
    record.close()


def test_an_entry_is_one_line(tmp_path: Path) -> None:
    """Whatever is in a prompt, a lone surrogate too."""
    record = opened(tmp_path)
    record.finish("a", ["a.png"], {"prompt": "two\nlines \u2028 \ud800 ü"})
    record.close()
    _, entry = lines(tmp_path)
    assert entry["options"]["prompt"] == "two\nlines \u2028 \ud800 ü"
