"""`sdxl-ref grid`: cells that are the very pictures of `refine` and `generate`, read once, planned before, labelled."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Refine, assert_one_line, pixels, settings, stop, texts
from safetensors.torch import save_file

from sdxl_ref.cli import main
from sdxl_ref.commands import axes
from sdxl_ref.config import InputError
from sdxl_ref.pictures.sheets import GAP, LabelledSheet
from sdxl_ref.pipelines import ImageToImagePipeline
from sdxl_ref.weights.checkpoint import Checkpoint

Capture = pytest.CaptureFixture[str]
SIDE = 64  # pixels of a cell


@pytest.fixture
def base(tiny_base_file: Path, here: Path) -> list[str]:
    return ["--base", str(tiny_base_file), "--height", "64", "--width", "64", "--steps", "2", "--prompt", "a cup"]


def grid(refine: Refine, *over: str, **changes: Any) -> list[str]:
    """The words of a grid over what `refine` makes in 2 steps."""
    _, image, *options = refine.words(**{"steps": 2, "strength": 1.0} | changes)
    return ["grid", image, "--over", *over, *options]


def cell(path: Path, row: int, column: int) -> np.ndarray:
    """The pixels of a cell: the last row and column end at the sheet's margins."""
    sheet = pixels(path)
    made = settings(path)
    columns = 1 + max(one["column"] for one in made["cells"])
    rows = 1 + max(one["row"] for one in made["cells"])
    labels = [[(name, "") for name in [*made["over"]][1:]]]
    pitch = LabelledSheet((SIDE, SIDE), [[]], labels).pitch
    top = sheet.shape[0] - (rows - row) * pitch
    left = sheet.shape[1] - (columns - column) * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def settings_of(path: Path, row: int, column: int) -> dict[str, Any]:
    """All settings of a cell, from what it shares with the others and what is its own."""
    made = settings(path)
    [own] = [one["settings"] for one in made["cells"] if (one["row"], one["column"]) == (row, column)]
    return {name: value for name, value in (made | own).items() if name not in ("over", "cells")}


# --- the cells ----------------------------------------------------------------------------------------------------


def test_each_cell_is_what_refine_makes(refine: Refine, here: Path, reads: Counter[str], capsys: Capture) -> None:
    """Strength across, sampler down: pixels and settings."""
    assert main(grid(refine, "strength=0.5,1", "sampler=euler,dpmpp_2m")) == 0
    assert reads == {Path(refine.options["checkpoint"]).name: 1}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("grid: 2 across, 2 down, on a sheet of ")
    assert any(line.startswith("2 of 4: strength 1, sampler euler: 2 of 2 steps, sigma ") for line in printed)
    assert printed[-1] == "wrote photo-grid.png"
    for row, sampler in enumerate(("euler", "dpmpp_2m")):
        for column, strength in enumerate((0.5, 1.0)):
            assert refine(steps=2, strength=strength, sampler=sampler, out="one.png") == 0
            assert np.array_equal(cell(here / "photo-grid.png", row, column), pixels(here / "one.png"))
            assert settings_of(here / "photo-grid.png", row, column) == settings(here / "one.png")


def test_adapters_go_on_and_off(refine: Refine, here: Path, reads: Counter[str]) -> None:
    """In addition to those of `--lora`; with none of its own a cell is as it was before any adapter."""
    layer = "lora_unet_middle_block_1_proj_in"
    for name, size in (("a", 0.5), ("b", 1.0)):
        factors = {"down": torch.full((1, 64), size), "up": torch.ones(64, 1)}
        save_file({f"{layer}.lora_{role}.weight": factor for role, factor in factors.items()}, f"{name}.safetensors")
    words = grid(refine, "lora=a.safetensors:0.5,none,b.safetensors", "steps=1,2", out="sheet.png")
    assert main(words) == 0
    assert sum(reads.values()) == 1
    for column, lora in enumerate(("a.safetensors:0.5", None, "b.safetensors")):
        assert refine(steps=2, strength=1.0, lora=lora, out="one.png") == 0
        assert np.array_equal(cell(here / "sheet.png", 1, column), pixels(here / "one.png"))
        assert settings_of(here / "sheet.png", 1, column) == settings(here / "one.png")
    assert not np.array_equal(cell(here / "sheet.png", 1, 0), cell(here / "sheet.png", 1, 1))
    assert main([*words, "--lora", "b.safetensors"]) == 0
    assert settings_of(here / "sheet.png", 0, 0)["lora"] == ["b.safetensors", "a.safetensors:0.5"]


def test_models_are_read_once_each(refine: Refine, tiny_base_file: Path, here: Path, reads: Counter[str]) -> None:
    own = refine.options["checkpoint"]
    words = grid(refine, f"checkpoint={own},{tiny_base_file}", "guidance-scale=1,3,5", checkpoint=None, out="sheet.png")
    assert main(words) == 0
    assert reads == {own.name: 1, tiny_base_file.name: 1}
    assert refine(steps=2, strength=1.0, checkpoint=tiny_base_file, guidance_scale=3, out="one.png") == 0
    assert np.array_equal(cell(here / "sheet.png", 1, 1), pixels(here / "one.png"))
    assert settings(here / "sheet.png")["over"]["checkpoint"] == [own.name, tiny_base_file.name]


def test_each_cell_is_what_generate_makes(base: list[str], tiny_refiner_file: Path, here: Path) -> None:
    """Three axes: the first across, the others down, the last one fastest. Prompts with commas are separated by |."""
    both = [*base, "--steps", "4", "--refiner", str(tiny_refiner_file)]
    over = ["prompt=a cup, blue|a dog", "two-stage=true,false", "karras=true,none"]
    assert main(["grid", "--over", *over, *both]) == 0
    for row, options in enumerate((["--two-stage", "--karras"], ["--two-stage"], ["--karras"], [])):
        assert main(["generate", *both, *options, "--prompt", "a cup, blue", "--out", "one.png"]) == 0
        assert np.array_equal(cell(here / "grid.png", row, 0), pixels(here / "one.png"))
        assert settings_of(here / "grid.png", row, 0) == settings(here / "one.png")
    made = settings(here / "grid.png")
    assert made["over"] == {
        "prompt": ["a cup, blue", "a dog"],
        "two-stage": ["true", "false"],
        "karras": ["true", "none"],
    }
    assert texts(here / "grid.png")["parameters"].startswith("a cup, blue; a dog\nSteps: 4, Sampler: Euler")


def test_pictures_of_several_sizes_and_a_seed_that_is_drawn(base: list[str], here: Path, capsys: Capture) -> None:
    assert main(["grid", "--over", "width=64,72", "seed=-1,5", *base]) == 0
    seed = int(capsys.readouterr().out.splitlines()[0].removeprefix("seed: "))
    assert [settings_of(here / "grid.png", row, 0)["seed"] for row in range(2)] == [seed, 5]
    assert settings(here / "grid.png")["over"]["seed"] == [str(seed), "5"]
    assert settings_of(here / "grid.png", 0, 1)["size"] == "72x64"


def test_the_help_has_the_options_of_the_command_behind_it(capsys: Capture) -> None:
    for words, own in ((["grid", "photo.png"], "--strength-rule"), (["grid"], "--two-stage")):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        shown = capsys.readouterr().out
        assert own in shown
        assert "--over" in shown
        assert "sdxl-ref grid photo.jpg --over" in shown


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_marked_and_the_others_are_kept(
    refine: Refine, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ImageToImagePipeline.decode

    def failing(self: Any, latents: torch.Tensor) -> torch.Tensor:
        if float(latents.std()) == stds.setdefault(0, float(latents.std())):
            raise InputError("the VAE's decoder returned values that are not finite")
        return decode(self, latents)

    stds: dict[int, float] = {}
    monkeypatch.setattr(ImageToImagePipeline, "decode", failing)
    assert main(grid(refine, "seed=1,2", out="sheet.png")) == 1
    captured = capsys.readouterr()
    assert captured.err == "failed: seed 1: the VAE's decoder returned values that are not finite\n"
    assert captured.out.splitlines()[-1] == "wrote sheet.png"
    first, second = settings(here / "sheet.png")["cells"]
    assert first["error"] == "the VAE's decoder returned values that are not finite"
    assert second["over"] == {"seed": "2"}
    assert tuple(cell(here / "sheet.png", 0, 0)[-1, -1]) == (228, 228, 228)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert refine(steps=2, strength=1.0, seed=2, out="one.png") == 0
    assert np.array_equal(cell(here / "sheet.png", 0, 1), pixels(here / "one.png"))


def test_what_is_finished_when_the_work_is_stopped_is_written(
    refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ImageToImagePipeline.run
    runs: list[Any] = []

    def stopping(self: Any, request: Any) -> Any:
        runs.append(request)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(self, request)

    monkeypatch.setattr(ImageToImagePipeline, "run", stopping)
    assert main(grid(refine, "seed=1,2,3", out="sheet.png")) == 1
    cells = settings(here / "sheet.png")["cells"]
    assert ["settings" in one for one in cells] == [True, False, False]
    assert cells[2]["error"] == "not painted: stopped before"


def several(name: str, count: int) -> str:
    return f"{name}={','.join('1' * count)}"


BAD = {
    "a name": (["strenght=0.1"], "--over: unknown option 'strenght': did you mean 'strength'? (see sdxl-ref"),
    "no name": (["0.1,0.3"], "--over expects NAME=VALUE,VALUE, found '0.1,0.3' (a picture comes first"),
    "a name of the other command": (["two-stage=true"], "unknown option 'two-stage'"),
    "twice": (["seed=1", "seed=2"], "--over has seed twice"),
    "what is for all": (["device=cpu,cuda"], "--device is no axis"),
    "no number": (["strength=0.1,x"], "argument --strength: invalid float value: 'x'"),
    "no value": (["steps="], "argument --steps: invalid int value: ''"),
    "a switch": (["karras=yes"], "--karras over 'yes': expected true, false or none"),
    "a range": (["strength=0.5,2"], "strength 2: strength must be above 0 and at most 1, found 2"),
    "a sampler": (["sampler=euler,eular"], "sampler eular: unknown sampler 'eular': did you mean 'euler'?"),
    "a choice": (["dtype=float32,float8"], "argument --dtype: invalid choice: 'float8'"),
    "not together": (["s-churn=none,1", "sampler=euler,dpmpp_2m"], "s_churn is of no use to the sampler dpmpp_2m"),
    "a model": (["checkpoint=none.safetensors"], "no such checkpoint: none.safetensors"),
    "an adapter": (["lora=none,gone.safetensors"], "lora gone.safetensors: could not read gone.safetensors"),
    "many": ([several("seed", 101), several("steps", 100)], "at most 10,000 pictures in a grid, found 10,100"),
    "large": ([several("seed", 250), "--out", "a.webp"], "expected at most 16,383 pixels a side in a .webp"),
    "a word": (["seed=1", "--sead", "2"], "unrecognized arguments: --sead 2: did you mean '--seed'"),
    "latents": (["seed=1", "--save-latents", "l.safetensors"], "--save-latents is of no use to a grid"),
    "a place": (["seed=1", "--out", "nowhere/x.png"], "existing, writable folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_weights_are_read(
    case: str, refine: Refine, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load", stop)
    words, message = BAD[case]
    assert main(grid(refine, *words)) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not list(here.iterdir())


def test_what_no_axis_gives_is_missing(refine: Refine, here: Path, capsys: Capture) -> None:
    assert main(grid(refine, "seed=1,2", prompt=None)) == 2
    assert_one_line(
        capsys.readouterr().err, "the following arguments are required: --prompt (see sdxl-ref grid --help)"
    )


def test_a_sheet_that_pillow_would_not_open(
    refine: Refine, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", SIDE * SIDE)
    assert main(grid(refine, "seed=1,2")) == 2
    assert_one_line(capsys.readouterr().err, "expected at most 8,192 pixels: give fewer values")


def test_labels_of_files_are_their_names_where_these_differ() -> None:
    action = argparse.ArgumentParser().add_argument("--lora", metavar="FILE[:SCALE]")

    def labels(*texts: str) -> list[str]:
        return [value.label for value in axes.labelled(action, [axes.Value(text, {}) for text in texts])]

    assert labels("x/a.safetensors:0.5", "y/b.safetensors") == ["a.safetensors:0.5", "b.safetensors"]
    assert labels("x/a.safetensors", "y/a.safetensors") == ["x/a.safetensors", "y/a.safetensors"]
