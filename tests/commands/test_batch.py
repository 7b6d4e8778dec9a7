"""`sdxl-ref batch`: every job once, to the same bits, whatever stops it and whatever it is denoised with."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import Lines, finished, hashes, jobs_of, prompts, write
from cases import diagonal
from command_line import Refine, assert_one_line, pixels, process, settings
from killing import killed_before
from PIL import Image
from safetensors.torch import save_file

from sdxl_ref.cli import main, parser
from sdxl_ref.commands.batch import NEVER_SHARED
from sdxl_ref.commands.jobs import Jobs
from sdxl_ref.networks.packing import why_not_here
from sdxl_ref.running.record import Record

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tiny_base_file: Path, here: Path) -> list[str]:
    """Options of all jobs: a tiny base, 2 steps of 64 pixels."""
    return ["--base", str(tiny_base_file), "--height", "64", "--width", "64", "--steps", "2", "--threads", "1"]


# --- what is made -------------------------------------------------------------------------------------------------


def test_a_job_is_what_its_command_makes(base: list[str], refine: Refine, reads: Counter[str], capsys: Capture) -> None:
    """Of both commands, with their options: pixels and settings, and the models are read once."""
    checkpoint = str(refine.options["checkpoint"])
    lines = [
        {"prompt": "a barn", "seed": 3, "guidance_scale": 2, "karras": True},
        {"image": refine.image, "prompt": "a cat", "checkpoint": checkpoint, "strength": 0.5},
        {"prompt": "two cups", "num_images": 2, "negative_prompt": "none"},
        {"image": refine.image, "prompt": "a dog", "checkpoint": checkpoint, "sigmas": [2, 0.5, 0], "strength": 1},
    ]
    shared = ["--steps", "2", "--threads", "1", "--plain"]
    for line in lines[::2]:
        line |= {"base": base[1], "height": 64, "width": 64}
    assert main(["batch", write(lines), "--out", "out", *shared]) == 0
    assert "wrote 4 of 4 jobs to out" in capsys.readouterr().out
    assert reads == {Path(base[1]).name: 1, Path(checkpoint).name: 1}
    made = {entry["options"]["prompt"]: entry["pictures"] for entry in finished()}
    generate = ["generate", *base[:6], "--steps", "2", "--plain"]
    options = ["--seed", "3", "--guidance-scale", "2", "--karras", "--out", "barn.png"]
    assert main([*generate, "--prompt", "a barn", *options]) == 0
    options = ["--num-images", "2", "--negative-prompt", "none", "--out", "cups.png"]
    assert main([*generate, "--prompt", "two cups", *options]) == 0
    assert refine(prompt="a cat", steps=2, strength=0.5, plain=True, out="cat.png") == 0
    assert refine(prompt="a dog", steps=2, strength=1, sigmas="2,0.5,0", plain=True, out="dog.png") == 0
    for prompt, names in (
        ("a barn", ["barn"]), ("two cups", ["cups-0", "cups-1"]), ("a cat", ["cat"]), ("a dog", ["dog"])
    ):  # fmt: skip
        for picture, name in zip(made[prompt], names, strict=True):
            ours, theirs = pixels(Path("out", picture)).astype(int), pixels(Path(f"{name}.png"))
            assert abs(ours - theirs).max() <= len(names) - 1  # several of one job are evaluated apart here
            assert settings(Path("out", picture)) == settings(Path(f"{name}.png"))


def test_a_folder_of_pictures_and_a_product(refine: Refine, here: Path) -> None:
    Path("photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(refine.image).save(Path("photos", name))
    shared = ["--checkpoint", str(refine.options["checkpoint"]), "--steps", "2", "--prompt", "a cat"]
    over = ["--over", "strength=0.5,1", "sampler=none,heun"]
    assert main(["batch", "photos", "--out", "out", *shared, *over]) == 0
    found = Counter((s["image"], s["strength"], s["sampler"]) for s in map(settings, Path("out").glob("*.png")))
    expected = [(image, strength, sampler) for image in ("a.png", "b.png") for strength in (0.5, 1.0)
                for sampler in ("euler", "heun")]  # fmt: skip
    assert found == Counter(expected)
    assert main(["batch", "photos", "--out", "photos", *shared]) == 2  # its pictures would be jobs of the next one


def test_a_table_says_the_same(base: list[str]) -> None:
    """As JSON does, whatever the type of a value there; equal lines are one job."""
    lines = [{"prompt": "a barn", "seed": 1, "karras": True, "guidance_scale": 2}, {"prompt": "a cup", "seed": 2}]
    assert main(["batch", write([*lines, lines[0]]), "--out", "out", *base]) == 0
    Path("jobs.csv").write_text("prompt,seed,karras,guidance-scale\na barn,1,true,2.0\na cup,2,,\n")
    before = hashes()
    assert len(before) == 2
    assert main(["batch", "jobs.csv", "--out", "out", *base]) == 0
    assert hashes() == before
    assert set(jobs_of().values()) == {1}


def test_the_pocket_pair_is_two_files(here: Path) -> None:
    lines: Lines = [{"prompt": "a red circle"}, {"prompt": "a red circle", "refiner": "pocket"}]
    assert main(["batch", write(lines), "--out", "out", "--base", "pocket", "--steps", "4", "--threads", "1"]) == 0
    assert len(hashes()) == 2


def test_a_bad_value_of_a_product_drops_no_other(base: list[str], capsys: Capture) -> None:
    words = ["batch", write(prompts(1)), "--out", "out", *base, "--over", "seed=1,x,3"]
    assert main(words) == 2
    assert "line 1: seed: invalid" in capsys.readouterr().err
    assert len(hashes()) == 2


def test_adapters_come_and_go(base: list[str], reads: Counter[str]) -> None:
    """Those of the line in addition to those of all lines; without any a picture is as it was before."""
    for name, size in (("a", 0.5), ("b", 1.0)):
        factors = {"down": torch.full((1, 64), size), "up": torch.ones(64, 1)}
        layer = "lora_unet_middle_block_1_proj_in"
        save_file({f"{layer}.lora_{role}.weight": factor for role, factor in factors.items()}, f"{name}.safetensors")
    lines: Lines = [{"prompt": "a barn"}, {"prompt": "a barn", "lora": "a.safetensors:0.5"}, {"prompt": "a cup"}]
    assert main(["batch", write(lines), "--out", "out", *base]) == 0
    assert main(["batch", write(lines[:2]), "--out", "more", "--lora", "b.safetensors", *base]) == 0
    found = {(s["prompt"], *s["lora"]): path for path in Path().glob("*/*.png") for s in [settings(path)]}
    a, b = "a.safetensors:0.5", "b.safetensors"
    assert set(found) == {("a barn",), ("a cup",), ("a barn", a), ("a barn", b), ("a barn", b, a)}
    assert reads == {Path(base[1]).name: 2}
    for (prompt, *lora), path in found.items():
        options = [word for file in lora for word in ("--lora", file)]
        assert main(["generate", "--prompt", prompt, *options, *base[:-2], "--out", "one.png"]) == 0
        assert pixels(path).tobytes() == pixels(Path("one.png")).tobytes()


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "dtype"), diagonal(["plain", "packed"], ["float32", "bfloat16"]))
def test_a_picture_does_not_depend_on_its_neighbours(way: str, dtype: str, base: list[str]) -> None:
    if way == "packed" and why_not_here({getattr(torch, dtype)}):
        pytest.skip(f"packing was not tried: {why_not_here({getattr(torch, dtype)})}")
    words = [*base, "--dtype", dtype, "--vae-dtype", dtype, *["--plain"] * (way == "plain")]
    jobs = write(prompts(6))
    for size in (1, 2, 3, 8):
        assert main(["batch", jobs, "--out", f"by-{size}", "--batch-size", str(size), *words]) == 0
    assert main(["batch", write(prompts(6)[::-1], "reversed.jsonl"), "--out", "reversed", *words]) == 0
    assert len(hashes("by-1")) == 6
    for folder in ("by-2", "by-3", "by-8", "reversed"):
        assert hashes(folder) == hashes("by-1")


def test_without_it_neighbours_share_an_evaluation(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_ref.networks.unet import UNet

    rows: list[int] = []
    forward = UNet.forward

    def counted(self: UNet, x: Any, *rest: Any) -> Any:
        rows.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(UNet, "forward", counted)
    shared = ["--batch-size", "3", "--plain", *base]
    assert main(["batch", write(prompts(4)), "--out", "together", "--no-batch-invariant", *shared]) == 0
    assert rows == [6, 6, 2, 2]  # both sides of three, then of one
    rows.clear()
    assert main(["batch", "jobs.jsonl", "--out", "apart", *shared]) == 0
    assert rows == [2] * 8


# --- stops --------------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on(base: list[str], capsys: Capture) -> None:
    """After a kill before any change of a file: every job once, bit for bit as undisturbed."""
    command = ["batch", write(prompts(3)), "--out", "whole", *base]
    assert main(command) == 0
    command[3] = "out"
    calls = 0
    while killed_before(lambda: main(command), calls):
        calls += 7
    assert calls > 50
    assert main(command) == 0
    assert hashes() == hashes("whole")
    assert set(jobs_of()) == set(jobs_of("whole"))
    assert "3 done before" in capsys.readouterr().out
    assert not list(Path("out").glob(".sdxl-ref-*"))


def test_ctrl_c(base: list[str]) -> None:
    """Between jobs and inside one: what is done is kept, status 130."""
    words = [sys.executable, "-m", "sdxl_ref", "batch", write(prompts(200)), "--out", "out", *base]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(Path("out").glob("*.png")):
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    done = len(jobs_of())
    assert f"stopped: {done} of 200 jobs are done; the same command goes on" in error
    assert 0 <= len(hashes()) - done <= 1  # a picture that was written is not noted yet
    assert done < 200


def test_one_batch_in_a_folder(base: list[str], capsys: Capture) -> None:
    words = [sys.executable, "-m", "sdxl_ref", "batch", write(prompts(200)), "--out", "out", *base]
    running = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not list(Path("out").glob("*.png")):
            assert running.poll() is None
        assert main(words[3:]) == 2
        assert_one_line(capsys.readouterr().err, "another batch is at work in out: wait for its end")
    finally:
        running.kill()
        running.wait()


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_a_bad_line_stops_nothing(base: list[str], refine: Refine, capsys: Capture) -> None:
    """Each is told at the end, by its number; the others are done."""
    checkpoint = str(refine.options["checkpoint"])
    lines = [
        {"prompt": "a barn"},
        {"prompt": "a barn", "stepz": 3},
        {"seed": 1},
        {"prompt": "a barn", "steps": "many"},
        {"prompt": "a barn", "karras": "maybe"},
        {"prompt": "a barn", "out": "barn.png"},
        {"prompt": "a barn", "device": "cpu"},
        {"prompt": "a barn", "seed": -1},
        {"prompt": 5},
        {"image": "nowhere.png", "prompt": "a cat", "checkpoint": checkpoint},
        {"prompt": "a barn", "sampler": "eular"},
        {"prompt": "a barn", "height": 65},
        {"prompt": "a barn", "num_images": True},
        {"prompt": "a barn", "base": "nothing.safetensors"},
        {"prompt": "a cup"},
    ]
    assert main(["batch", write(lines), "--out", "out", "--steps", "2", *base[:6]]) == 2
    error = capsys.readouterr().err
    print(error)
    for number, message in {
        2: "unknown option 'stepz' of generate: did you mean 'steps'?",
        3: "expected prompt, found none",
        4: "invalid int value: 'many'",
        5: "expected true or false, found 'maybe'",
        6: "a batch names its pictures itself",
        7: "device is the same for all jobs",
        8: "a batch needs one that stays",
        9: "expected text, found 5",
        10: "--height is of no use to a job of refine",
        11: "did you mean 'euler'?",
        12: "height must be a multiple of 8",
        13: "num_images: expected a value, found True",
        14: "nothing.safetensors",
    }.items():
        assert any(f"error: line {number}: " in line and message in line for line in error.splitlines()), number
    assert {settings(path)["prompt"] for path in Path("out").glob("*.png")} == {"a barn", "a cup"}
    page = Path("out/index.html").read_text()
    assert "Not done: 13" in page
    assert "stepz" in page


def test_a_job_that_fails_among_others(refine: Refine, here: Path) -> None:
    """It shows only when they are denoised: the others come out as without it."""
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save("half.png")
    Image.fromarray(np.zeros_like(half)).save("black.png")
    shared = [
        "--checkpoint",
        str(refine.options["checkpoint"]),
        "--steps",
        "4",
        "--strength",
        "0.5",
        "--batch-size",
        "3",
    ]
    lines: Lines = [{"image": refine.image, "prompt": f"cat {i}", "seed": i, "mask": "half.png"} for i in range(3)]
    assert main(["batch", write(lines), "--out", "whole", "--threads", "1", *shared]) == 0
    lines[1]["mask"] = "black.png"
    assert main(["batch", write(lines), "--out", "out", "--threads", "1", *shared]) == 2
    assert len(hashes()) == 2
    assert hashes().items() <= hashes("whole").items()


def test_latents_where_they_cannot_be_written(base: list[str], capsys: Capture) -> None:
    lines: Lines = [{"prompt": "a barn", "save_latents": "nowhere/a.safetensors"}, {"prompt": "a cup"}]
    lines[1]["save_latents"] = "cup.safetensors"
    assert main(["batch", write(lines), "--out", "out", *base]) == 2
    assert "line 1: cannot write nowhere/a.safetensors" in capsys.readouterr().err
    assert len(hashes()) == 1
    assert Path("cup.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads must be from 1 to 1024, found 0"),
        (["--batch-size", "0"], "--batch-size must be from 1 to 1024, found 0"),
        (["--over", "strength"], "--over expects NAME=V1,V2 with the name of an option, found 'strength'"),
        (["--over", "stepz=1"], "--over expects NAME=V1,V2 with the name of an option, found 'stepz=1'"),
        (["--over", "steps=1", "steps=2"], "--over has steps twice"),
    ],
)
def test_bad_input(words: list[str], message: str, base: list[str], capsys: Capture) -> None:
    assert main(["batch", write(prompts(1)), "--out", "out", *base[:-2], *words]) == 2
    assert_one_line(capsys.readouterr().err, message)


def test_other_weights_under_the_same_name(base: list[str], tiny_refiner_file: Path, capsys: Capture) -> None:
    copy = Path("base.safetensors")
    copy.write_bytes(Path(base[1]).read_bytes())
    words = ["--out", "out", "--base", str(copy), *base[2:]]
    assert main(["batch", write(prompts(1)), *words]) == 0
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert main(["batch", write(prompts(2)), *words]) == 2
    assert "base.safetensors is not the file that this batch began with" in capsys.readouterr().err
    assert len(hashes()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(base: list[str], capsys: Capture) -> None:
    Path("out").mkdir(mode=0o500)
    assert main(["batch", write(prompts(1)), "--out", "out", *base]) == 2
    assert_one_line(capsys.readouterr().err, "could not write")


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_every_picture_with_its_options(base: list[str]) -> None:
    lines = [{"prompt": 'a <b>"barn"</b> & cup', "seed": 5}, {"prompt": "two", "num_images": 2}]
    assert main(["batch", write(lines), "--out", "out", *base]) == 0
    page = Path("out/index.html").read_text()
    assert page.count("<img ") == 3
    assert all(f'src="{name}"' in page for name in hashes())
    assert "a &lt;b&gt;&quot;barn&quot;&lt;/b&gt; &amp; cup" in page
    assert "<b>barn" not in page.replace("<b>a", "")
    assert "seed 5" in page


def test_a_process(base: list[str]) -> None:
    """As from a shell: no bar where standard error is no terminal, status 0."""
    done = process(["batch", write(prompts(2)), "--out", "out", *base])
    assert done.returncode == 0
    assert "job" not in done.stderr
    assert "batch: 2 jobs; 0 done before; 1 threads" in done.stdout


@pytest.mark.sweep
def test_a_hundred_thousand_lines(base: list[str]) -> None:
    """What it takes to begin, and that a job's line in the record costs the same at the end."""
    count = 100_000
    words = ["batch", write(prompts(count)), "--out", "out", *base]
    Path("out").mkdir()
    record = Record(Path("out"))
    record.begin({"threads": 1, "batch_invariant": True})
    a = parser(words).parse_args(words)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    jobs = Jobs(a, {name: value for name, value in vars(a).items() if name not in NEVER_SHARED})
    pieces = jobs.pieces(1)
    seconds = time.perf_counter() - began
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert len(pieces) == count
    costs = []
    for piece in pieces:
        began = time.perf_counter()
        record.refresh()
        record.finish(piece[0].name, [f"{piece[0].name}.png"], piece[0].options)
        costs.append(time.perf_counter() - began)
    record.close()
    first, last = (statistics.median(some) for some in (costs[:5000], costs[-5000:]))
    began = time.perf_counter()
    assert len(Record(Path("out")).done) == count
    reading = time.perf_counter() - began
    print(f"{count} lines: {seconds:.1f} s and {memory / 1e6:.0f} MB to begin, {reading:.1f} s to read a full record")
    print(f"a job's line: {1e6 * first:.0f} us at first, {1e6 * last:.0f} us in the end")
    assert last <= 1.5 * first
    assert memory <= 300e6
