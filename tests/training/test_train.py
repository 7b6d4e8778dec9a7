"""`sdxl-ref train`: bad input is refused before the work, a folder is one run's, and notes for the user."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import command, save_model, save_pictures

from sdxl_ref.cli import main
from sdxl_ref.commands.train import open_model
from sdxl_ref.training.state import locked
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from sdxl_ref.weights.stated_config import config_from_json
from weights_convert.convert import convert


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
    "a rank of 0": ({"rank": "0"}, untouched, "rank of a LoRA must be from 1 to 4096, found 0"),
    "layers that match nothing": ({"layers": "attn9"}, untouched, "no layer has a name with 'attn9' in it"),
    "a rank for a full run": ({"full": None, "rank": "4"}, untouched, "--rank is a LoRA's"),
    "steps past the range": ({"timesteps": "0 1000"}, untouched, "must lie in 0 to 999"),
    "no steps": ({"steps": "0"}, untouched, "steps must be a number from 1 to 1e9, found 0"),
    "an endless rate": ({"learning-rate": "inf"}, untouched, "learning rate must be a number from 0 to 1e9, found inf"),
    "an alpha of 0": ({"alpha": "0"}, untouched, "alpha of a LoRA must be a finite number above 0, found 0"),
    "a seed to be drawn": ({"seed": "-1"}, untouched, "training needs a seed that stays: give a number from 0 on"),
    "no pictures a batch": ({"batch-size": "0"}, untouched, "--batch-size must be from 1 to 10000, found 0"),
    "too many a batch": ({"batch-size": "10001"}, untouched, "--batch-size must be from 1 to 10000, found 10001"),
    "too many a step": ({"accumulate": "1000001"}, untouched, "--accumulate must be from 1 to 1000000, found 1000001"),
    "a rank past all matrices": ({"rank": "4097"}, untouched, "rank of a LoRA must be from 1 to 4096, found 4097"),
    "endless layers": ({"layers": "((a{1000}){1000}){1000}"}, untouched, "10000 times: write it without"),
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
    log = tmp_path / "log.csv"
    for text, message in (
        (
            "step,loss,gradient_norm,learning_rate,seconds\n1,0.5,1,0.1,3\n",
            "log.csv, but no state of the run that wrote",
        ),
        ("name,price\ncup,3\n", "expected a log of a run, whose first line is step,loss,gradient_norm"),
    ):
        log.write_text(text)
        assert main(words) == 2
        assert message in capsys.readouterr().err
        assert log.read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == [log.name]
    log.unlink()
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


# --- what is read is not written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["state.safetensors", "log.csv", "lora_peft.safetensors", "finetuned.safetensors"])
@pytest.mark.parametrize("read", ["model", "picture", "captions"])
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
def test_nothing_that_is_read_is_written(
    link: Callable[..., None], read: str, written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model.safetensors")
    data = save_pictures(tmp_path / "data")
    source = {"model": model, "picture": data / "1.png", "captions": data / "metadata.jsonl"}[read]
    before = source.read_bytes()
    (tmp_path / "out").mkdir()
    link(source, tmp_path / "out" / written)
    assert main(command(model, data, tmp_path / "out", "--steps", "1")) == 2
    assert f"{written}: it is read: choose another place" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert os.listdir(tmp_path / "out") == [written]


def test_a_models_folder_is_no_place_for_a_run(
    small_refiner_file: Path, refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder in diffusers' layout none below either; a folder that holds one file may have others below."""
    convert(small_refiner_file, tmp_path / "folder", "diffusers")
    (tmp_path / "single").mkdir()
    shutil.copy(refiner_file, tmp_path / "single")
    (tmp_path / "link").symlink_to(tmp_path / "single")
    for model, out in (("folder", "folder"), ("folder", "folder/unet"), ("single", "single"), ("single", "link")):
        before = sorted((tmp_path / model).rglob("*"))
        assert main(command(tmp_path / model, pictures, tmp_path / out, "--steps", "1")) == 2
        assert "expected --out apart from the model's folder" in capsys.readouterr().err
        assert sorted((tmp_path / model).rglob("*")) == before
    for steps in ("1", "1"):  # the second time its own state is there
        assert main(command(tmp_path / "single", pictures, tmp_path / "single" / "run", "--steps", steps)) == 0


def test_a_run_may_have_its_folder_among_the_pictures(refiner_file: Path, tmp_path: Path) -> None:
    data = save_pictures(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    for _ in range(2):  # the second time its own results are there
        for out in (data, data / "out"):
            assert main(command(refiner_file, data, out, "--steps", "1")) == 0
    assert before.items() <= {path.name: path.read_bytes() for path in data.iterdir() if path.is_file()}.items()


# --- what of the data is not used -----------------------------------------------------------------------------------


def test_what_is_not_used_is_told_before_the_work(
    refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_pictures(tmp_path / "data")
    shutil.copy(data / "0.png", data / "unnamed.png")
    assert main(command(refiner_file, data, tmp_path / "out", "--steps", "1")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "note: left out: 1 picture (unnamed.png) without a line in metadata.jsonl"


def test_captions_beside_the_pictures_train_as_lines_do(
    refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pictures and captions in either form: the same adapter, bit for bit."""
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    captions = {line["file_name"]: line["text"] for line in lines}
    as_lines = Path(shutil.copytree(pictures, tmp_path / "lines"))
    as_files = Path(shutil.copytree(pictures, tmp_path / "files"))
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (as_lines / "metadata.jsonl").write_text("\n".join(rows))
    (as_files / "metadata.jsonl").unlink()
    for name, text in captions.items():
        (as_files / name).with_suffix(".txt").write_text(text + "\n")
    results = []
    for data in (as_lines, as_files):
        out = tmp_path / f"{data.name} out"
        assert main(command(refiner_file, data, out, "--steps", "2")) == 0
        results.append(load_file(out / "lora_kohya.safetensors"))
    assert "note: captions are those of 4 text files (0.txt, 1.txt, 2.txt, …)" in capsys.readouterr().out
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_model_that_returns_v_by_its_folders_settings_says_so_in_the_result(tmp_path: Path) -> None:
    """A fine-tuned file takes over the metadata, and has no scheduler to say it."""
    convert(POCKET["pocket-refiner"], tmp_path / "folder", "diffusers")
    path = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    model = open_model(str(tmp_path / "folder"), None, None)
    assert model.config.prediction == "v"
    assert model.metadata["modelspec.prediction_type"] == "v"
    assert config_from_json(model.metadata[CONFIG_KEY]).prediction == "v"
    assert open_model("pocket-refiner", None, None).metadata == open_checkpoint("pocket-refiner").metadata
