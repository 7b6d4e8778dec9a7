"""The record of a batch: what it holds after any stop, and what it refuses."""

import json
from pathlib import Path

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.running.record import Record, entries

SETTINGS = {"threads": 2}


def finished(folder: Path, *jobs: str, name: str = "") -> None:
    """A process that finishes these jobs, one picture each."""
    record = Record(folder, SETTINGS, name)
    for job in jobs:
        record.finish(job, [f"{job}.png"], {"prompt": "a barn"})
    record.close()


def test_finished_jobs_are_known_to_the_next_process(tmp_path: Path) -> None:
    finished(tmp_path, "a", "b")
    finished(tmp_path, "c")
    record = Record(tmp_path, SETTINGS)
    assert record.done == {"a": ["a.png"], "b": ["b.png"], "c": ["c.png"]}
    assert next(set(entry) for _, entry in entries(tmp_path)) == {"format", "threads"}
    assert sum("format" in entry for _, entry in entries(tmp_path)) == 1
    record.close()


def test_a_job_whose_picture_is_gone_is_not_done(tmp_path: Path) -> None:
    finished(tmp_path, "a", "b")
    record = Record(tmp_path, SETTINGS)
    assert record.is_done("a", {"a.png"})
    assert not record.is_done("b", {"a.png"})
    assert not record.is_done("c", {"a.png"})
    record.close()


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    """At every byte: what stood before it counts, and what is added afterwards."""
    finished(tmp_path, "a", "b")
    path = tmp_path / "record.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        finished(tmp_path, "c")
        record = Record(tmp_path, SETTINGS)
        expected = {"c"} | ({"a"} if size >= len(lines[0] + lines[1]) - 1 else set())
        assert set(record.done) == expected | ({"b"} if size >= len(whole) - 1 else set())
        record.close()


def test_several_processes_read_each_other(tmp_path: Path) -> None:
    finished(tmp_path, "a", name="0-of-2")
    finished(tmp_path, "b", name="1-of-2")
    record = Record(tmp_path, SETTINGS)
    assert set(record.done) == {"a", "b"}
    record.close()
    assert {path.name for path in tmp_path.iterdir()} == {
        "record.jsonl", "record-0-of-2.jsonl", "record-1-of-2.jsonl"
    }  # fmt: skip


def test_a_batch_goes_on_as_it_began(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    with pytest.raises(InputError, match=r"holds a batch with another threads \(2\), expected 1: go on with the same"):
        Record(tmp_path, {"threads": 1})


def test_weights_keep_their_hash(tmp_path: Path) -> None:
    record = Record(tmp_path, SETTINGS)
    record.check_weights({"refiner.safetensors": "0" * 64})
    record.check_weights({"refiner.safetensors": "0" * 64})  # written once
    record.close()
    record = Record(tmp_path, SETTINGS)
    assert sum("weights" in entry for _, entry in entries(tmp_path)) == 1
    with pytest.raises(InputError, match=r"refiner.safetensors is not the file that this batch began with"):
        record.check_weights({"refiner.safetensors": "1" * 64})
    record.close()


def test_an_entry_is_one_line(tmp_path: Path) -> None:
    """Whatever is in a prompt, a lone surrogate too."""
    record = Record(tmp_path, SETTINGS)
    record.finish("a", ["a.png"], {"prompt": "two\nlines \u2028 \ud800 ü"})
    record.close()
    lines = (tmp_path / "record.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["options"]["prompt"] == "two\nlines \u2028 \ud800 ü"
