"""The recipe at toy length: every stage runs, is resumed, and ends in two files that open."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_data import CONFIGS as TINY

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.pocket import autoencoder, recipe, stages, towers, unets
from sdxl_ref.pocket.models import CONFIGS
from sdxl_ref.pocket.recipe import STAGES, run_stage
from sdxl_ref.pocket.stages import RecipeFolder
from sdxl_ref.training.loop import Settings
from sdxl_ref.training.state import locked
from sdxl_ref.weights.opening import open_checkpoint

CPU = torch.device("cpu")
SCENES = 12
LARGEST = 25e6  # bytes of a file


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of a few pictures; samples after the second one."""
    settings = Settings(steps=3, learning_rate=1e-3, warm_up=1)
    for stage in stages.SETTINGS:
        monkeypatch.setitem(stages.SETTINGS, stage, settings)
    for stage, objectives in unets.OBJECTIVES.items():
        monkeypatch.setitem(unets.OBJECTIVES, stage, dict.fromkeys(objectives, 2))
    for stage, crops in autoencoder.AUTOENCODER.items():
        few = crops._replace(pictures=2, varied=min(crops.varied, 1))
        monkeypatch.setitem(autoencoder.AUTOENCODER, stage, few)
    monkeypatch.setattr(towers, "CAPTIONS", 2)
    monkeypatch.setattr(towers, "TESTED", 10)
    monkeypatch.setattr(unets, "SAMPLE_EVERY", 2)
    monkeypatch.setattr(unets, "SAMPLES", 2)


@pytest.mark.usefixtures("short")
@pytest.mark.sweep
@pytest.mark.parametrize("configs", [TINY, CONFIGS], ids=["tiny", "pocket"])
def test_all_stages(
    configs: Mapping[str, ModelConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base is stopped and resumed on the way, and paints samples; a step is enough for the others."""
    for stage, settings in stages.SETTINGS.items():
        if stage != "base":
            monkeypatch.setitem(stages.SETTINGS, stage, replace(settings, steps=1))
    folder = RecipeFolder(tmp_path, CPU, SCENES, configs)
    for stage in STAGES:
        run_stage(folder, stage, stop=2 if stage == "base" else None)
        assert folder.result_path("base").exists() == (STAGES.index(stage) > STAGES.index("base"))
        run_stage(folder, stage)
    assert (tmp_path / "base" / "samples_000002.png").exists()
    printed = capsys.readouterr()
    assert "step 2: all right 0/1 with one thing, 0/1 with two" in printed.out + printed.err
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if "pocket" not in path.name}
    for stage in STAGES:  # what is done is not done again
        run_stage(folder, stage)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert set(json.loads((tmp_path / "times.json").read_text())) == set(STAGES)
    for kind, config in configs.items():
        path = tmp_path / f"pocket_{kind}.safetensors"
        assert open_checkpoint(path).config == config
        assert path.stat().st_size <= LARGEST
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    base = folder.result("base")
    refiner = folder.result("refiner")
    shared = [key for key in refiner if key.startswith("text_encoder_2.")]
    assert shared  # the towers are frozen: both files have those of their own stage
    assert all(torch.equal(base[key], refiner[key]) for key in shared)


def test_a_stage_without_the_one_before_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage 'towers' first"):
        run_stage(RecipeFolder(tmp_path, CPU, scenes=10), "base")


@pytest.mark.usefixtures("short")
def test_a_stage_goes_on_only_with_what_it_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RecipeFolder.__init__, "__defaults__", (SCENES, TINY))

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["recipe", "--out", str(tmp_path), *words])
        recipe.main()

    command("--stage", "towers", "--stage", "vae")
    command("--stage", "vae-more", "--stop", "1")
    whole = (tmp_path / "vae.safetensors").read_bytes()
    other = {name: tensor + 1 for name, tensor in load_file(tmp_path / "vae.safetensors").items()}
    save_file(other, tmp_path / "vae.safetensors")
    for message in (r"another learned from: vae \(", r"could not read .*vae\.safetensors .*run the stage 'vae' again"):
        with pytest.raises(SystemExit, match="2"):
            command("--stage", "vae-more")
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert "Traceback" not in error
        (tmp_path / "vae.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "vae.safetensors").write_bytes(whole)
    command("--stage", "vae-more")
    assert (tmp_path / "vae-more.safetensors").exists()
    with locked(tmp_path / "vae-more"), pytest.raises(SystemExit, match="2"):
        command("--stage", "vae-more")
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stage base", "run the stage 'towers' first, to its end"),
        ("--stage write", "base.safetensors is not there: run the stage 'base' first"),
        ("--stage towers --stop 0", "expected a step of at least 1 to stop at, found 0"),
        ("--device toaster", "expected a device such as cpu or cuda, found 'toaster'"),
        ("--out FILE", "could not make the folder"),
        ("--stage vae", "told.json (Expecting value"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    np.save(tmp_path / "pixels.npy", np.zeros((3, 128, 128, 3), np.uint8))
    (tmp_path / "told.json").touch()
    (tmp_path / "times.json").touch()  # is no reason to stop
    given = words.replace("FILE", str(tmp_path / "file")).split()
    monkeypatch.setattr("sys.argv", ["recipe", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("short")
def test_a_stopped_stage_ends_the_command_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RecipeFolder.__init__, "__defaults__", (SCENES, TINY))
    for folder, stops in (("whole", [None]), ("pieces", ["1", "2", None])):
        for stop in stops:
            words = ["--stage", "towers", "--out", str(tmp_path / folder)]
            words += [] if stop is None else ["--stop", stop]
            monkeypatch.setattr("sys.argv", ["recipe", *words])
            recipe.main()
            assert (tmp_path / folder / "towers.safetensors").exists() == (stop is None)
    assert "towers: stopped at step 2, goes on when started again" in capsys.readouterr().out
    whole = load_file(tmp_path / "whole" / "towers.safetensors")
    pieces = load_file(tmp_path / "pieces" / "towers.safetensors")
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)
