"""Where the results of a command go: found out before the work, never half a file, nothing that is read replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import readers
from command_line import Refine, Stopped, assert_one_line, settings, stop
from PIL import Image
from safetensors.torch import load_file

from sdxl_ref.cli import main
from sdxl_ref.pipelines import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline

GENERATE = ["generate", "--prompt", "a cup", "--base", "pocket"]
ELSEWHERE = "expected a file name in an existing, writable folder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "none/out.png"}, f"cannot write none/out.png: {ELSEWHERE}"),
        ({"out": "."}, f"cannot write .: {ELSEWHERE}"),
        ({"out": "a" * 300 + ".png"}, ELSEWHERE),
        ({"save_latents": "none/a.safetensors"}, f"cannot write none/a.safetensors: {ELSEWHERE}"),
        ({"save_latents": "a" * 300}, ELSEWHERE),
    ],
    ids=["a missing folder", "a folder", "an endless name", "latents in a missing folder", "latents, an endless name"],
)
def test_places_that_cannot_be_written_are_found_before_the_work(
    changes: dict[str, Any],
    message: str,
    refine: Refine,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageToImagePipeline, "open", stop)
    assert refine(**{"out": "out.png"} | changes) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert os.listdir(here) == []
    with pytest.raises(Stopped):
        refine(out="out.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert refine(out="locked/out.png") == 2
    assert_one_line(capsys.readouterr().err, "cannot write locked/out.png")


def test_what_is_no_file_is_not_replaced(
    refine: Refine, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe here, as a device would be; and a link to nothing."""
    monkeypatch.setattr(ImageToImagePipeline, "open", stop)
    os.mkfifo("pipe")
    Path("link.png").symlink_to("none/out.png")
    for changes in ({"out": "pipe"}, {"save_latents": "pipe"}, {"out": "link.png"}):
        assert refine(**changes) == 2
        assert_one_line(capsys.readouterr().err, ELSEWHERE)


def test_what_is_read_is_not_written(
    refine: Refine, here: Path, photo: Path, tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is one file written twice; by whatever name."""
    Path("here").symlink_to(here)
    Path("in.png").write_bytes(photo.read_bytes())
    Path("link.png").symlink_to("in.png")
    before = {path: path.read_bytes() for path in (here / "in.png", tiny_refiner_file)}
    cases: list[dict[str, Any]] = [{"out": out} for out in ("in.png", "here/in.png", "link.png", tiny_refiner_file)]
    cases += [{"out": "out.png", "save_latents": twin} for twin in ("out.png", "./out.png", "here/out.png")]
    cases += [{"out": "out.png", "save_latents": tiny_refiner_file}]
    for changes in cases:
        assert refine("in.png", **changes) == 2
        error = capsys.readouterr().err
        is_twin = str(changes.get("save_latents")).endswith("out.png")
        reason = "another result is written there: name" if is_twin else "it is read: choose another place"
        assert_one_line(error, reason)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir()) == ["here", "in.png", "link.png"]


@pytest.mark.parametrize("failing", ["out.png", "out.safetensors"])
def test_a_full_disk_leaves_nothing_behind(
    failing: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents alone are no result; the picture alone is one. No half file is."""

    def replace(self: Path, target: Path) -> Path:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        os.replace(self, target)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    assert refine(out="out.png", save_latents="out.safetensors") == 2
    assert_one_line(capsys.readouterr().err, f"could not write {failing}: No space left on device")
    assert os.listdir(here) == ([] if failing == "out.png" else ["out.png"])


def test_results_go_through_links(refine: Refine, here: Path) -> None:
    Path("folder").mkdir()
    for name, old in (("out.png", "old.png"), ("out.safetensors", "old.safetensors")):
        Path("folder", old).write_bytes(b"old")
        Path(name).symlink_to(Path("folder", old))
    assert refine(out="out.png", save_latents="out.safetensors") == 0
    assert os.readlink("out.png") == "folder/old.png"
    assert settings(here / "folder" / "old.png")["prompt"] == "a cat"
    assert os.readlink("out.safetensors") == "folder/old.safetensors"
    assert load_file("folder/old.safetensors")["latents"].shape == (1, 4, 8, 8)
    assert sorted(os.listdir()) == ["folder", "out.png", "out.safetensors"]
    assert sorted(os.listdir("folder")) == ["old.png", "old.safetensors"]


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out", "out.bmp", "out.safetensors", "out.png.bak", ".png", "out."])
def test_a_name_that_says_no_format_is_refused_before_the_work(
    out: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for pipeline in (ImageToImagePipeline, TextToImagePipeline):
        monkeypatch.setattr(pipeline, "open", stop)
    monkeypatch.setattr(EnsemblePipeline, "from_pretrained", stop)
    message = f"cannot write {out}: expected a name that ends in .png, .jpg, .jpeg, .webp, .tif, .tiff"
    for command in (refine.words(out=out), [*GENERATE, "--out", out], ["demo", "--out", out]):
        assert main(command) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert os.listdir(here) == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "tif"])
def test_the_name_says_the_format(suffix: str, refine: Refine, here: Path, tiny_base_file: Path) -> None:
    """Of every picture that a command writes, the sheet too."""
    assert refine(out=f"out.{suffix}", steps=2) == 0
    size = ["--height", "64", "--width", "64", "--steps", "2", "--num-images", "2", "--base", str(tiny_base_file)]
    assert main([*GENERATE[:3], *size, "--out", f"many.{suffix}"]) == 0
    names = [f"{name}.{suffix}" for name in ("many", "many-0", "many-1", "out")]
    assert sorted(os.listdir()) == sorted(names)
    for name in names:
        with Image.open(name) as image:
            assert image.format == {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
            text = image.info["parameters"] if suffix == "png" else readers.user_comment(image)
        assert readers.web_ui(text)["Sampler"] == "Euler"
