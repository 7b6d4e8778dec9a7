"""`sdxl-ref evaluate` as a whole, on an untrained pair."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import CONFIGS

from sdxl_ref.cli import main
from sdxl_ref.commands import evaluate as evaluate_command
from sdxl_ref.commands.evaluate import measure
from sdxl_ref.pocket import evaluate
from sdxl_ref.weights.checkpoint import build, prefixes
from sdxl_ref.weights.checkpoint_saving import save_checkpoint


@pytest.fixture
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LEVELS", (0, 199, 999))
    monkeypatch.setattr(evaluate, "UNDER_200", (50, 150))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command with an untrained pair, whose pictures are grey."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    words = ["evaluate"]
    for kind, config in CONFIGS.items():
        path = folder / f"{kind}.safetensors"
        save_checkpoint(path, config, {part: build(part, config) for part in prefixes(config)}, torch.float16)
        words += [f"--{kind}", str(path)]
    return words


@pytest.mark.parametrize("levels", ["few_levels", pytest.param("", id="all levels", marks=pytest.mark.sweep)])
def test_the_command(
    levels: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if levels:
        request.getfixturevalue(levels)
    measured: list[dict[str, Any]] = []

    def measure_once(*arguments: Any) -> dict[str, Any]:
        if not measured:
            measured.append(measure(*arguments))
        return measured[0]

    monkeypatch.setattr(evaluate_command, "measure", measure_once)
    out = tmp_path / "evaluation"
    command = [*words, "--out", str(out)]
    assert main([*command, "--prompts", "8", "--steps", "3"]) == 0
    text = capsys.readouterr().out
    assert "| all right | base alone | ensemble | two stages | drawn |" in text
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["base alone"]["scores"]["one thing"]["all_right"] == {"right": 0, "of": 2}
    assert figures["drawn"]["scores"]["two things, held out"]["all_right"]["of"] == 2
    assert len(figures["errors"]["base"]) == len(figures["levels"])
    with Image.open(out / "evaluation.png") as chart:
        assert np.asarray(chart.convert("L")).std() > 10
    assert text.count("(0/4; ") >= 3  # a relation is counted where there is one
    before = {path: path.read_bytes() for path in out.iterdir()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([*command, "--prompts", "8", "--steps", "3"]) == 2
    told = capsys.readouterr()
    assert "could not write" in told.err
    assert "| all right | base alone" in told.out  # what was measured is not lost
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_bad_input(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "evaluation"
    bad = {"--prompts 7": "multiple of 4", "--steps 2": "expected 3 to 1000 steps", "--guidance-scale nan": "finite"}
    for options, message in bad.items():
        assert main([*words, "--out", str(out), "--prompts", "8", *options.split()]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main([*words, "--prompts", "8", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder, or the name of a new one" in capsys.readouterr().err
    assert not out.exists()
    assert (tmp_path / "file").read_text() == "mine"
