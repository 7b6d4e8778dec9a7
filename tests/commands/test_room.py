"""Whether a run fits into the memory that is free: told before any work."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Refine, assert_one_line, pixels, settings

from sdxl_ref.commands import room


def free(bytes_: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: bytes_)


@pytest.mark.parametrize("amount", [None, 1e12])
def test_no_plan_is_made_where_there_is_plenty(
    amount: float | None, refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or where the system does not say."""
    free(amount, monkeypatch)
    monkeypatch.setattr("sdxl_ref.pipelines.memory_plan.plan", lambda run: pytest.fail("a plan was made"))
    assert refine(out="out.png") == 0
    made = settings(here / "out.png")
    assert (made["tile"], made["tiles_vae"]) == (False, False)


def test_a_run_that_cannot_fit_is_one_line(
    refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(1e6, monkeypatch)
    assert refine(out="out.png") == 2
    assert_one_line(capsys.readouterr().err, "of memory, and 0.0 GB is free: use a smaller picture or batch")
    assert os.listdir(here) == []


def test_tiles_are_chosen_where_a_run_would_not_fit(
    refine: Refine, here: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which paints the same picture here, of one tile, but for the rounding of the autoencoder's bands."""
    assert refine(out="whole.png") == 0
    capsys.readouterr()
    plans: list[Any] = []

    def fitting(run: Any, amount: int) -> Any:
        plans.append((run, amount))
        return room.replace(run, tiled=True), "memory: tiled"

    free(1e6, monkeypatch)
    monkeypatch.setattr("sdxl_ref.pipelines.memory_plan.fitting", fitting)
    assert refine(out="tiled.png") == 0
    assert capsys.readouterr().out.count("memory: tiled") == 1
    [(run, _)] = plans
    assert (run.height, run.width, run.guided, run.encodes, run.pictures) == (64, 64, True, True, 1)
    made = settings(here / "tiled.png")
    assert (made["tile"], made["tiles_vae"]) == (True, True)
    assert np.abs(pixels(here / "tiled.png").astype(int) - pixels(here / "whole.png")).max() <= 1


def test_one_tile_that_was_asked_for_is_the_whole_run(refine: Refine, here: Path) -> None:
    for name, tile in (("whole.png", None), ("tiled.png", True)):
        assert refine(out=name, tile=tile) == 0
    assert np.array_equal(pixels(here / "tiled.png"), pixels(here / "whole.png"))
    assert settings(here / "tiled.png")["tiles_vae"] is False


def test_larger_pictures_are_shrunk_unless_they_are_to_stay(
    refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for most, size in ((64 * 64, "64x64"), (32 * 32, "32x32")):
        assert refine(out=f"{most}.png", max_pixels=most) == 0
        assert f"used at {size}" in capsys.readouterr().out
    assert refine(max_pixels=8) == 2
    assert_one_line(capsys.readouterr().err, "--max-pixels must be at least 64, found 8")
