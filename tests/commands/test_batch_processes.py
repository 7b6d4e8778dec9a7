"""`sdxl-ref batch` by several processes: torchrun's ranks, shards, Ray's actors. Nothing lost, nothing twice."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from batches import hashes, jobs_of, prompts, wait_for, write
from cases import sample
from command_line import Refine, assert_one_line, settings
from PIL import Image

from sdxl_ref.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tiny_base_file: Path, here: Path) -> list[str]:
    """Options of all jobs: a tiny base, 2 steps of 64 pixels."""
    return ["--base", str(tiny_base_file), "--height", "64", "--width", "64", "--steps", "2"]


def torchrun(ranks: int, words: list[str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "-m", "sdxl_ref", *words], env=environment, **pipes)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def undisturbed(lines: list[dict[str, Any]], base: list[str]) -> dict[str, str]:
    """What one process makes of a list."""
    assert main(["batch", write(lines), "--out", "whole", "--threads", "1", *base]) == 0
    return hashes("whole")


@pytest.mark.parametrize("jobs", sample([24, 200], 24))
def test_two_ranks_share_the_jobs(jobs: int, base: list[str]) -> None:
    """One of them is killed half way, and torchrun begins again: every job once, to the bits of one process."""
    expected = undisturbed(prompts(jobs), base)
    running = torchrun(2, ["batch", "jobs.jsonl", "--out", "out", *base], "--max-restarts=2")
    wait_for(running, jobs // 3)
    os.kill(children(running.pid)[1], signal.SIGKILL)
    output, error = running.communicate(timeout=600)
    assert running.returncode == 0, error
    assert f"wrote {jobs} of {jobs} jobs to out" in output
    assert hashes() == expected
    assert set(jobs_of().values()) == {1}
    assert {path.name for path in Path("out").glob("record*")} >= {"record-rank-0.jsonl", "record-rank-1.jsonl"}
    assert main(["batch", "jobs.jsonl", "--out", "out", *base]) == 0  # one process goes on with what they recorded
    assert hashes() == expected


def test_shards_of_a_list(base: list[str], capsys: Capture) -> None:
    """As a job array does them, here one after the other; parts are disjoint and together the whole."""
    expected = undisturbed(prompts(7), base)
    names: list[set[str]] = []
    for shard in range(3):
        words = ["batch", "jobs.jsonl", "--out", "out", "--shard", f"{shard}/3", "--threads", "1", *base]
        assert main(words) == 0
        names.append(set(hashes()).difference(*names))
    assert [len(part) for part in names] == [3, 2, 2]
    assert hashes() == expected
    assert set(jobs_of().values()) == {1}
    for bad in ("3/3", "x", "1/0", "-1/2"):
        assert main(["batch", "jobs.jsonl", "--out", "out", f"--shard={bad}", *base]) == 2
        assert "--shard must be I/N, with I from 0 to N - 1" in capsys.readouterr().err


def ray_actors() -> list[int]:
    """Processes of Ray that are workers of a batch."""
    found = subprocess.run(["pgrep", "-f", "ray::.*Worker"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.parametrize("jobs", sample([12, 200], 12))
def test_rays_actors(jobs: int, base: list[str]) -> None:
    """One is killed half way; what the record holds before is left out."""
    pytest.importorskip("ray", reason="Ray is an extra: its part of batch was not tried")
    expected = undisturbed(prompts(jobs), base)
    assert main(["batch", write(prompts(3), "first.jsonl"), "--out", "out", "--threads", "1", *base]) == 0
    words = [sys.executable, "-m", "sdxl_ref", "batch", "jobs.jsonl", "--out", "out", "--ray=", *base]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(running, jobs // 2)
    os.kill(ray_actors()[0], signal.SIGKILL)
    output, error = running.communicate(timeout=600)
    assert running.returncode == 0, error
    assert f"wrote {jobs} of {jobs} jobs to out" in output
    assert hashes() == expected
    assert set(jobs_of().values()) == {1}


@pytest.mark.sweep
def test_two_hundred_jobs_killed_at_random_moments(base: list[str]) -> None:
    """25 kills, then another number of ranks: every job once, bit-equal to an undisturbed run."""
    expected = undisturbed(prompts(200), base)
    moments = random.Random(0)
    words = ["batch", "jobs.jsonl", "--out", "out", "--threads", "1", *base]
    kills = 0
    while kills < 25:
        running = subprocess.Popen([sys.executable, "-m", "sdxl_ref", *words], stderr=subprocess.PIPE)
        begun = len(hashes()) if Path("out").exists() else 0
        while (len(hashes()) if Path("out").exists() else 0) == begun and running.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        assert running.poll() is None, "it ended before it was killed"
        running.send_signal(moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        running.communicate()
        kills += 1
    print(f"after 25 kills {len(hashes())} of 200 jobs are done")
    ranks = torchrun(2, words)
    _, error = ranks.communicate(timeout=900)
    assert ranks.returncode == 0, error
    assert hashes() == expected
    assert set(jobs_of().values()) == {1}


def test_a_tar_of_jobs(refine: Refine, here: Path) -> None:
    """As webdataset writes it: options, prompt and picture under one name."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is an extra: a tar was not tried")
    picture = io.BytesIO()
    Image.open(refine.image).save(picture, "PNG")
    with webdataset.TarWriter("jobs.tar") as tar:
        tar.write({"__key__": "one", "PNG": picture.getvalue(), "txt": b"a cat\n", "json": b'{"seed": 4}'})
        tar.write({"__key__": "two", "png": picture.getvalue(), "json": b'{"prompt": "a dog", "strength": 0.5}'})
        tar.write({"__key__": "bad", "png": picture.getvalue(), "json": b'{"prompt": '})
    shared = ["--checkpoint", str(refine.options["checkpoint"]), "--steps", "4", "--plain"]
    assert main(["batch", "jobs.tar", "--out", "out", "--threads", "1", *shared]) == 2
    found = {(s["prompt"], s["seed"], s["strength"], s["image"]) for s in map(settings, Path("out").glob("*.png"))}
    assert found == {("a cat", 4, 0.3, "one.PNG"), ("a dog", 0, 0.5, "two.png")}
    with tarfile.open("jobs.tar") as tar_file:
        tar_file.extract("one.PNG", filter="data")
    assert refine("one.PNG", prompt="a cat", seed=4, steps=4, strength=0.3, plain=True, out="one-refined.png") == 0
    [path] = [path for path in Path("out").glob("*.png") if settings(path)["prompt"] == "a cat"]
    assert settings(path)["image_sha256"] == settings(Path("one-refined.png"))["image_sha256"]
    assert Image.open(path).tobytes() == Image.open("one-refined.png").tobytes()


def test_the_name_of_a_tar_is_no_command(refine: Refine, here: Path) -> None:
    """webdataset gives what follows `pipe:` in a name to a shell."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is an extra: a tar was not tried")
    with webdataset.TarWriter("jobs.tar") as tar:
        tar.write({"__key__": "one", "png": Path(refine.image).read_bytes(), "txt": b"a cat"})
    name = "pipe:touch ran; cat jobs.tar; true .tar"
    Path("jobs.tar").rename(name)
    shared = ["--checkpoint", str(refine.options["checkpoint"]), "--steps", "4", "--plain"]
    assert main(["batch", name, "--out", "out", *shared]) == 0
    assert len(hashes()) == 1
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "0/2", "--ray="], "--shard and --ray both say who does which job"),
        (["--lease", "0"], "--lease must be from 1 to 86400 seconds, found 0"),
        (["--ray=127.0.0.1:1"], "no Ray cluster was found at 127.0.0.1:1"),
    ],
)
def test_bad_input(words: list[str], message: str, base: list[str], capsys: Capture) -> None:
    assert main(["batch", write(prompts(1)), "--out", "out", *base, *words]) == 2
    assert_one_line(capsys.readouterr().err, message)
