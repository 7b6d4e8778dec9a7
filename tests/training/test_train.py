"""`sdxl-ref train`: bad input is refused before the work, a folder is one run's, and notes for the user."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import command, save_pictures

from sdxl_ref.cli import main
from sdxl_ref.training.state import locked


def empty_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("")


def line_without_text(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}')


def damaged_picture(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"\x89PNG broken")


def untouched(folder: Path) -> None:
    """No fault."""


BAD: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "an empty folder": ({}, empty_metadata, "is empty"),
    "a line without text": ({}, line_without_text, "line 1: expected text"),
    "a damaged picture": ({}, damaged_picture, "--skip-bad"),
    "no such data": ({"data": "nowhere"}, untouched, "no such folder of pictures: nowhere"),
    "a rank of 0": ({"rank": "0"}, untouched, "rank of a LoRA must be at least 1, found 0"),
    "layers that match nothing": ({"layers": "attn9"}, untouched, "no layer has a name with 'attn9' in it"),
    "a rank for a full run": ({"full": None, "rank": "4"}, untouched, "--rank is a LoRA's"),
    "steps past the range": ({"timesteps": "0 1000"}, untouched, "must lie in 0 to 999"),
    "no steps": ({"steps": "0"}, untouched, "steps must be a number from 1 to 1e9, found 0"),
    "an endless rate": ({"learning-rate": "inf"}, untouched, "learning rate must be a number from 0 to 1e9, found inf"),
    "an alpha of 0": ({"alpha": "0"}, untouched, "alpha of a LoRA must be a finite number above 0, found 0"),
    "a seed to be drawn": ({"seed": "-1"}, untouched, "training needs a seed that stays: give a number from 0 on"),
    "no pictures a batch": ({"batch-size": "0"}, untouched, "--batch-size must be at least 1, found 0"),
    "the pair without its half": ({"checkpoint": "pocket"}, untouched, "the pocket pair is two models"),
    "an unknown prediction": ({"prediction": "x0"}, untouched, "invalid choice: 'x0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, spoil, message = BAD[case]
    folder = save_pictures(tmp_path / "pictures")
    spoil(folder)
    words = {"checkpoint": str(refiner_file), "data": str(folder), "out": str(tmp_path / "out"), "device": "cpu"}
    line = ["train"]
    for name, value in (words | options).items():
        line.append(f"--{name}")
        line += [] if value is None else value.split(" ") if name == "timesteps" else [value]
    assert main(line) == 2
    error = capsys.readouterr().err
    told = [text for text in error.splitlines() if text.startswith("sdxl-ref: error: ")]
    print(told[0])
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_run_is_not_gone_on_with_by_another(
    refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = command(refiner_file, pictures, out, "--steps", "1", "--rank", "2")
    assert main(words) == 0
    files = {path: path.read_bytes() for path in out.glob("*.*")}
    cached = {path: path.read_bytes() for path in (out / "cache").iterdir()}
    others = ["--rank 3", "--learning-rate 0.5", "--timesteps 0 99", "--batch-size 2", "--prediction v"]
    for other in others:
        capsys.readouterr()
        assert main([*words, *other.split()]) == 2
        assert "go on with the same, or use another folder" in capsys.readouterr().err
    other_pictures = save_pictures(tmp_path / "other", (256, 128))
    assert main(command(refiner_file, other_pictures, out, "--steps", "1", "--rank", "2")) == 2
    assert all(path.read_bytes() == content for path, content in cached.items())  # hours of work on a large set
    assert files == {path: path.read_bytes() for path in out.glob("*.*")}


def test_what_is_in_the_folder_is_not_overwritten(
    refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results whose state was deleted, and a folder in which another run is at work."""
    words = command(refiner_file, pictures, tmp_path, "--steps", "1", "--rank", "2")
    adapter = tmp_path / "lora_peft.safetensors"
    adapter.write_bytes(b"precious")
    assert main(words) == 2
    assert "lora_peft.safetensors, but no state of the run that wrote it: move it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [adapter.name]
    assert adapter.read_bytes() == b"precious"
    adapter.unlink()
    with locked(tmp_path):
        assert main(words) == 2
    assert "another run is at work in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_layers_that_match_nothing_are_refused_before_anything_is_made(
    refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    assert main(command(refiner_file, pictures, tmp_path / "out", "--layers", "attn9")) == 2
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_are_warned_of(
    refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(refiner_file, pictures, tmp_path, "--full", "--steps", "1", "--dtype", "bfloat16")) == 0
    assert "note: steps below 1/512 of a weight are lost in bfloat16" in capsys.readouterr().out


def test_a_refiner_without_scores_is_told_a_constant(
    refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pictures(tmp_path / "pictures")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a cup"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert main(command(refiner_file, folder, tmp_path / "out", "--steps", "1")) == 0
    assert "4 of 4 pictures have no aesthetic_score: 6.0 is used for them" in capsys.readouterr().out
