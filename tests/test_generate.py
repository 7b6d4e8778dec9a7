"""`sdxl-ref generate` on small models: the three ways to make a picture, files, plans, errors."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sdxl_ref.cli import main
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline


@pytest.fixture
def base(small_base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command up to the base, at a small size, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    size = ["--height", "64", "--width", "72", "--steps", "10"]
    return ["generate", "--prompt", "a cup", "--base", str(small_base_file), *size]


def test_base_alone(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, "--seed", "3"]) == 0
    assert "plan: 10 of 10 steps, sigma 8.3" in capsys.readouterr().out
    with Image.open("generated.png") as picture:
        assert picture.size == (72, 64)
        settings = json.loads(picture.text["sdxl_ref"])  # type: ignore[attr-defined]
    assert settings["seed"] == 3
    assert settings["unconditional"] == "base zeros"
    assert len(settings["checkpoint"]["sha256"]) == 64


def test_ensemble_with_karras(base: list[str], small_refiner_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, "--refiner", str(small_refiner_file), "--karras", "--low-memory"]) == 0
    assert "plan: base 6 evaluations, sigma 8.3" in capsys.readouterr().out
    low = Path("generated.png").read_bytes()
    assert main([*base, "--refiner", str(small_refiner_file), "--karras"]) == 0
    assert Path("generated.png").read_bytes() == low


def test_two_stages(base: list[str], small_refiner_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*base, "--refiner", str(small_refiner_file), "--two-stage", "--strength", "0.5", "--out", "two.png"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "plan: base 10 of 10 steps" in printed
    assert "plan: refiner 5 of 10 steps" in printed
    assert main(base) == 0
    assert Path("two.png").read_bytes() != Path("generated.png").read_bytes()


def test_several_images_have_a_seed_each_and_a_sheet(base: list[str]) -> None:
    assert main([*base, "--num-images", "3", "--seed", "5", "--out", "many.png"]) == 0
    pictures = [Image.open(f"many-{i}.png") for i in range(3)]
    assert [json.loads(p.text["sdxl_ref"])["seed"] for p in pictures] == [5, 6, 7]  # type: ignore[attr-defined]
    assert Image.open("many.png").size == (2 * 72 + 8, 2 * 64 + 8)
    assert main([*base, "--seed", "6", "--out", "alone.png"]) == 0
    difference = [abs(a - b) for a, b in zip(pictures[1].tobytes(), Image.open("alone.png").tobytes(), strict=True)]
    assert max(difference) <= 1


def test_a_picture_too_small_for_a_watermark_is_found_before_the_work(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "steps", None)  # nothing is sampled
    assert main([*base, "--watermark"]) == 2
    message = "sdxl-ref: error: a watermark needs a picture of 256x256 pixels or more, found 72x64\n"
    assert capsys.readouterr().err == message


BAD = {
    "a refiner as base": (["--base", "REFINER"], "expected a base"),
    "a base as refiner": (["--refiner", "BASE"], "expected a refiner"),
    "score without a refiner": (["--aesthetic-score", "6"], "--aesthetic-score is the refiner's"),
    "switch without a refiner": (["--switch", "0.5"], "--switch is the refiner's"),
    "two stages without a refiner": (["--two-stage"], "--two-stage is the refiner's"),
    "strength without two stages": (["--refiner", "REFINER", "--strength", "0.5"], "give --two-stage too"),
    "switch of two stages": (["--refiner", "REFINER", "--two-stage", "--switch", "0.5"], "--two-stage has none"),
    "switch over 1": (["--refiner", "REFINER", "--switch", "1.5"], "at most 1, found 1.5"),
    "two switches": (["--refiner", "REFINER", "--switch", "0.5", "--switch-step", "3"], "give one of them"),
    "no refiner step": (["--refiner", "REFINER", "--switch-sigma", "0.001"], "refiner would run 0 steps"),
    "height": (["--height", "65"], "height must be a multiple of 8, found 65"),
    "no image": (["--num-images", "0"], "at least 1, found 0"),
    "no folder": (["--out", "nowhere/x.png"], "existing, writable folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, base: list[str], small_base_file: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = BAD[case]
    files = {"BASE": str(small_base_file), "REFINER": str(small_refiner_file)}
    assert main([*base, *(files.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path.cwd().iterdir())
