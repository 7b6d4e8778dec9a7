"""No result of any command replaces a file that it reads: status 2 in one line, before the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Refine, Stopped, assert_one_line, stop

from sdxl_ref.cli import main
from sdxl_ref.commands import kept
from sdxl_ref.pipelines import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.pocket import evaluate as pocket_evaluate
from sdxl_ref.weights.opening import POCKET
from sdxl_ref.weights.saving import temporary_name
from weights_convert.cli import main as convert_main
from weights_convert.convert import convert

Case = Callable[[Path], tuple[dict[str, Any], str]]  # in an empty folder: options of `refine`, and what they replace


@pytest.fixture(autouse=True)
def before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened: a command that gets there fails the test."""
    for pipeline in (ImageToImagePipeline, TextToImagePipeline):
        monkeypatch.setattr(pipeline, "open", stop)


@pytest.fixture
def model(here: Path) -> Path:
    """A folder in diffusers' layout, as far as a listing shows."""
    for name in ("model_index.json", "unet/config.json", "unet/model.safetensors", "README.md", "deep/er/notes.txt"):
        (here / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "model" / name).write_text("precious")
    (here / "cache").mkdir()
    (here / "cache" / "blob").write_text("precious")
    (here / "model" / "vae").mkdir()
    (here / "model" / "vae" / "model.safetensors").symlink_to(here / "cache" / "blob")
    (here / "model" / "back").symlink_to(here / "model")
    return here / "model"


@pytest.mark.parametrize(
    "target",
    [
        "model/model_index.json",
        "model/unet/config.json",
        "model/unet/model.safetensors",
        "model/README.md",
        "model/deep/er/notes.txt",
        "model/vae/model.safetensors",
        "cache/blob",
        "model/back/unet/config.json",
        "link",
        "hard",
    ],
)
@pytest.mark.parametrize("option", ["out", "save_latents"])
def test_all_of_a_models_folder_is_read(
    option: str, target: str, model: Path, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to("model/unet/model.safetensors")
    os.link("model/unet/model.safetensors", "hard")
    assert refine(checkpoint="model", **{"out": "out.png", option: target}) == 2
    assert_one_line(
        capsys.readouterr().err, f"cannot write {target}: it is read, as a file of model: choose another place"
    )
    assert Path(target).read_text() == "precious"
    assert not Path("out.png").exists()


def test_a_new_file_in_a_models_folder_is_no_file_of_it(model: Path, refine: Refine) -> None:
    with pytest.raises(Stopped):
        refine(checkpoint="model", out="model/deep/out.png")


@pytest.mark.parametrize("adapter", ["l.safetensors", "l.safetensors:0.5", "adapter"])
@pytest.mark.parametrize("option", ["out", "save_latents"])
def test_adapters_are_read_with_their_configuration(
    option: str, adapter: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("adapter").mkdir()
    targets = [Path("l.safetensors"), Path("adapter_config.json")]
    if adapter == "adapter":
        targets = [Path("adapter", target) for target in targets]
    for target in targets:
        target.write_text("precious")
        assert refine(lora=adapter, **{"out": "out.png", option: str(target)}) == 2
        assert_one_line(capsys.readouterr().err, f"cannot write {target}: it is read")
        assert target.read_text() == "precious"


@pytest.mark.parametrize("number", ["", "-0", "-2"])
def test_numbered_pictures_replace_nothing_that_is_read(
    number: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Path(f"a{number}.png")
    read.write_text("precious")
    words = ["generate", "--base", str(read), "--prompt", "x", "--num-images", "3", "--out", "a.png"]
    assert main(words) == 2
    assert_one_line(capsys.readouterr().err, f"cannot write {read}: it is read")
    assert read.read_text() == "precious"


def test_the_pocket_pair_is_read_by_its_name(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demonstration and the evaluation read it too."""
    copies = {name: here / path.name for name, path in POCKET.items()}
    for name, copy in copies.items():
        shutil.copy(POCKET[name], copy)
    monkeypatch.setattr(kept, "POCKET", copies)
    monkeypatch.setattr(pocket_evaluate, "prompts", lambda count: None)
    base, refiner = map(str, copies.values())
    generate = ["generate", "--base", "pocket", "--prompt", "x", "--out", base]
    refine = ["refine", "x.png", "--checkpoint", "pocket-refiner", "--prompt", "x", "--out", refiner]
    Path("evaluation").mkdir()
    Path("evaluation", "evaluation.md").hardlink_to(base)
    for words in (generate, refine, ["demo", "--out", base], ["evaluate"]):
        assert main(words) == 2
        assert_one_line(capsys.readouterr().err, ": it is read, as a file of pocket")
    assert all(copy.read_bytes() == POCKET[name].read_bytes() for name, copy in copies.items())


def test_a_repository_is_read_where_the_hubs_cache_keeps_it(
    here: Path, refine: Refine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    snapshot = Path("hub/models--somebody--model/snapshots/main")
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("precious")
    assert refine(checkpoint="somebody/model", out=snapshot / "model_index.json") == 2
    assert_one_line(capsys.readouterr().err, "it is read, as a file of somebody/model")


@pytest.mark.parametrize("command", ["refine", "generate", "demo"])
def test_what_a_kill_left_is_cleared_before_the_next_run(
    command: str, here: Path, photo: Path, tiny_refiner_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Path(temporary_name(ended.pid)).mkdir()
    words = {
        "refine": [str(photo), "--checkpoint", str(tiny_refiner_file), "--prompt", "x"],
        "generate": ["--base", "pocket", "--prompt", "x"],
        "demo": [],
    }
    monkeypatch.setattr("sdxl_ref.commands.demo.EnsemblePipeline.from_pretrained", stop)
    with pytest.raises(Stopped):
        main([command, *words[command], "--out", "out.png"])
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("merge model.safetensors l.safetensors:0.5", "model.safetensors"),
        ("merge model.safetensors l.safetensors:0.5", "l.safetensors"),
        ("merge model.safetensors l.safetensors", "adapter_config.json"),
        ("merge folder l.safetensors", "folder/unet/config.json"),
        ("extract model.safetensors other.safetensors --rank 1", "model.safetensors"),
        ("extract model.safetensors other.safetensors --rank 1", "other.safetensors"),
        ("convert l.safetensors --model model.safetensors", "l.safetensors"),
        ("convert l.safetensors --model model.safetensors", "model.safetensors"),
        ("convert l.safetensors --model folder", "folder/model_index.json"),
    ],
)
def test_adapter_tools_replace_nothing_that_they_read(
    words: str, read: str, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with --force either."""
    for name in ("model.safetensors", "other.safetensors"):
        shutil.copy(small_refiner_file, name)
    for name in ("l.safetensors", "adapter_config.json"):
        Path(name).write_text("precious")
    convert(small_refiner_file, Path("folder"), "diffusers")
    before = Path(read).read_bytes()
    Path("link").symlink_to(read)
    for out in (read, "link"):
        assert convert_main(["lora", *words.split(), "--out", out, "--force"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"weights-convert: error: cannot write {out}: it is read")
        assert error.count("\n") == 1
    assert Path(read).read_bytes() == before
