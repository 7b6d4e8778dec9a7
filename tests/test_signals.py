"""Every command that writes, ended by a signal at moments spread over its run: nothing half, nothing lost.

What was at the target stays whole until the new is there; the same command then ends as if nothing had happened.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import random_file
from killing import forked
from peers import TINY_BASE
from training_runs import command, save_model, save_pictures

import sdxl_ref.cli
import weights_convert.cli

MOMENTS = 20  # of each signal
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
Words = list[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base_file: Path, tiny_refiner_file: Path) -> dict[str, Words]:
    """The words of every command but its program, up to its result, for which it has OUT."""
    folder = tmp_path_factory.mktemp("inputs")
    photo = str(Path(sdxl_ref.cli.__file__).parent / "data" / "photo.jpg")
    random_file(TINY_BASE, folder / "adapter.safetensors")
    model = save_model(folder / "refiner.safetensors")
    pictures = save_pictures(folder / "pictures")
    base, refiner = str(tiny_base_file), str(tiny_refiner_file)
    assert weights_convert.cli.main(["convert", base, str(folder / "folder"), "--to", "diffusers"]) == 0
    paint = ["--prompt", "a cup", "--steps", "8", "--plain"]
    small = ["--max-pixels", "4096"]
    return {
        "to diffusers": ["weights-convert", "convert", base, "OUT", "--to", "diffusers", "--force"],
        "to official": ["weights-convert", "convert", str(folder / "folder"), "OUT", "--to", "official", "--force"],
        "merge": [
            "weights-convert",
            "lora",
            "merge",
            base,
            str(folder / "adapter.safetensors"),
            "--out",
            "OUT",
            "--force",
        ],
        "refine": ["sdxl-ref", "refine", photo, "--checkpoint", refiner, "--out", "OUT.png", *small, *paint],
        "generate": [
            "sdxl-ref",
            "generate",
            "--base",
            base,
            "--out",
            "OUT.png",
            "--width",
            "64",
            "--height",
            "64",
            *paint,
        ],
        "train": ["sdxl-ref", *command(model, pictures, Path("OUT"), "--steps", "12", "--save-every", "2")],
        "train in full": [
            "sdxl-ref",
            *command(model, pictures, Path("OUT"), "--full", "--steps", "6", "--save-every", "2"),
        ],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name but those that say how long something took, and in which pieces latents were encoded."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.csv", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.parent.name != "cache"}


def runner(words: Words) -> Callable[[], int]:
    program, *rest = words
    main = {"sdxl-ref": sdxl_ref.cli.main, "weights-convert": weights_convert.cli.main}[program]
    return lambda: main(rest)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("of", ["to diffusers", "to official", "merge", "refine", "generate", "train", "train in full"])
def test_a_signal_at_any_moment(of: str, name: str, inputs: dict[str, Words], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The target had another run's whole result before: that, or the new one, is what is there after each."""
    torch.set_num_threads(1)
    work = runner(inputs[of])
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    began = time.monotonic()
    child = forked(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    took = time.monotonic() - began
    expected = contents(whole)
    assert expected
    here = tmp_path / "here"
    shutil.copytree(whole, here) if not of.startswith("train") else here.mkdir()
    monkeypatch.chdir(here)
    ended = 0
    for moment in range(MOMENTS):
        child = forked(work)
        time.sleep(took * (moment + 0.5) / MOMENTS)
        os.kill(child, getattr(signal, name))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1, -getattr(signal, name))  # training ends its step and saves
        ended += status != 0
        if not of.startswith("train"):
            left = {key: data for key, data in contents(here).items() if ".sdxl-ref-" not in key}
            assert left.keys() == expected.keys()
            assert left == expected
    assert ended >= MOMENTS // 2
    child = forked(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = contents(here)
    assert [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)] == []
    print(f"{of}, {name}: {ended} of {MOMENTS} ended it, over {took:.1f} s")
