"""`sdxl-ref batch` when something breaks: the line, the exit status, and what is on the disk after."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batches import hashes, jobs_of, prompts, wait_for, write
from command_line import assert_one_line

from sdxl_ref.cli import main

Capture = pytest.CaptureFixture[str]
SIZE = 6_000  # bytes: fewer than a picture has


@pytest.fixture
def base(tiny_base_file: Path, here: Path) -> list[str]:
    """Options of all jobs: a tiny base, 2 steps of 64 pixels."""
    small = ["--height", "64", "--width", "64", "--steps", "2", "--threads", "1"]
    return ["--base", str(tiny_base_file), *small]


def started(words: list[str], **options: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "sdxl_ref", *words], **pipes, **options)


def last_line(error: str) -> str:
    """Of standard error, without what tells of the schedule."""
    return error.rstrip("\n").splitlines()[-1]


def goes_on(words: list[str], expected: dict[str, str]) -> None:
    """That the same command ends with every job done once, to the bits of an undisturbed run."""
    assert main(words) == 0
    assert hashes() == expected
    assert set(jobs_of().values()) == {1}
    assert not list(Path("out").glob(".sdxl-ref-*"))


@pytest.fixture
def batch(base: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a batch of 30 jobs, and the pictures that it makes undisturbed."""
    assert main(["batch", write(prompts(30)), "--out", "whole", *base]) == 0
    return ["batch", "jobs.jsonl", "--out", "out", *base], hashes("whole")


Batch = tuple[list[str], dict[str, str]]


def test_a_full_disk(batch: Batch) -> None:
    """No picture is half written, and none is noted; nothing further is tried."""
    words, expected = batch
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))  # noqa: E731
    running = started(words, preexec_fn=limit)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 2
    assert_one_line(last_line(error) + "\n", "could not write out/")
    assert hashes() == {}
    assert not jobs_of()
    goes_on(words, expected)


def test_a_record_that_cannot_be_added_to(batch: Batch) -> None:
    """A picture without a line in the record is not done, and is made again."""
    words, expected = batch
    assert main(["batch", write(prompts(1), "one.jsonl"), "--out", "out", *words[4:]]) == 0
    record = Path("out/record.jsonl")
    content = record.read_bytes()
    record.write_bytes(content[: len(content) - 9])
    goes_on(words, expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
def test_a_signal(name: str, batch: Batch) -> None:
    words, expected = batch
    running = started(words)
    wait_for(running, 3)
    running.send_signal(getattr(signal, name))
    _, error = running.communicate(timeout=60)
    assert running.returncode == (130 if name == "SIGINT" else -getattr(signal, name))
    if name == "SIGINT":
        done = len(jobs_of())
        assert last_line(error) == f"sdxl-ref: stopped: {done} of 30 jobs are done; the same command goes on"
    assert all(expected[picture] == digest for picture, digest in hashes().items())
    goes_on(words, expected)


def test_a_checkpoint_that_is_replaced(batch: Batch) -> None:
    """Meanwhile: the weights that were read are used to the end. Before: it is refused."""
    words, expected = batch
    checkpoint = Path("base.safetensors")
    shutil.copy(words[5], checkpoint)
    words[5] = str(checkpoint)
    running = started(words)
    wait_for(running, 3)
    other = bytearray(checkpoint.read_bytes())
    other[-1] ^= 1
    Path("other").write_bytes(other)
    os.replace("other", checkpoint)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    assert len(hashes()) == len(expected)
    Path("out", next(iter(hashes()))).unlink()
    running = started(words)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "base.safetensors is not the file that this batch began with (sha256 " in last_line(error)


def test_a_folder_that_vanishes(batch: Batch) -> None:
    """As a network drive that is lost: one line, and nothing is made elsewhere."""
    words, expected = batch
    running = started(words)
    wait_for(running, 3)
    os.rename("out", "gone")
    _, error = running.communicate(timeout=120)
    assert running.returncode == 2
    assert_one_line(last_line(error) + "\n", "could not write out/")
    assert not Path("out").exists()
    os.rename("gone", "out")
    goes_on(words, expected)


def test_links(batch: Batch) -> None:
    """The folder may be one. A picture that is a link to elsewhere is replaced there, as every result is."""
    words, expected = batch
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere")
    name = next(iter(expected))
    Path("target.png").touch()
    Path("out", name).symlink_to(Path("target.png").resolve())
    goes_on(words, expected)
    assert Path("out", name).is_symlink()


def test_a_file_in_the_place_of_the_folder(base: list[str], capsys: Capture) -> None:
    Path("out").touch()
    assert main(["batch", write(prompts(1)), "--out", "out", *base]) == 2
    assert_one_line(capsys.readouterr().err, "could not make the folder out: ")


def test_a_pipe_in_the_place_of_the_record(base: list[str], capsys: Capture) -> None:
    Path("out").mkdir()
    os.mkfifo("out/record.jsonl")
    assert main(["batch", write(prompts(1)), "--out", "out", *base]) == 2
    assert_one_line(capsys.readouterr().err, "out/record.jsonl is a pipe or a device")
