"""`sdxl-ref generate` on tiny models: the three ways to make a picture, files, plans, errors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
import torch
from command_line import Stopped, assert_one_line, pixels, settings, stop, texts
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_ref import EnsemblePipeline, TextToImagePipeline
from sdxl_ref.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tiny_base_file: Path, here: Path) -> list[str]:
    """The command up to the base, at a small size, in an empty folder."""
    size = ["--height", "64", "--width", "72", "--steps", "10"]
    return ["generate", "--prompt", "a cup", "--base", str(tiny_base_file), *size]


@pytest.fixture
def both(base: list[str], tiny_refiner_file: Path) -> list[str]:
    return [*base, "--refiner", str(tiny_refiner_file)]


# --- the three ways -----------------------------------------------------------------------------------------------


def test_base_alone(base: list[str], here: Path, tiny_base_file: Path, capsys: Capture) -> None:
    assert main([*base, "--seed", "3", "--plain"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0].startswith("plan: 10 of 10 steps, sigma 8.3")
    assert captured.out.splitlines()[-1] == "wrote generated.png"
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    generator = torch.Generator().manual_seed(3)
    [image] = pipe("a cup", height=64, width=72, num_inference_steps=10, generator=generator).images
    assert np.array_equal(pixels(here / "generated.png"), np.asarray(image))
    made = settings(here / "generated.png")
    assert made["seed"] == 3
    assert made["size"] == "72x64"
    assert made["unconditional"] == "base zeros"
    assert made["checkpoint"]["sha256"] == hashlib.sha256(tiny_base_file.read_bytes()).hexdigest()


def test_ensemble(both: list[str], here: Path, tiny_base_file: Path, tiny_refiner_file: Path, capsys: Capture) -> None:
    assert main([*both, "--plain", "--karras", "--negative-prompt", "blurry"]) == 0
    assert "plan: base 6 evaluations, sigma 8.3" in capsys.readouterr().out
    pipe = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    call: dict[str, Any] = {"height": 64, "width": 72, "num_inference_steps": 10, "karras": True}
    generator = torch.Generator().manual_seed(0)
    [image] = pipe("a cup", negative_prompt="blurry", generator=generator, **call).images
    assert np.array_equal(pixels(here / "generated.png"), np.asarray(image))
    made = settings(here / "generated.png")
    assert made["refiner_checkpoint"]["file"] == tiny_refiner_file.name
    assert made["unconditional"].startswith("base negative prompt encoded; refiner ")


def fields(path: Path) -> dict[str, str]:
    return readers.web_ui(texts(path)["parameters"])


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ([], "0.8"),
        (["--switch", "0.65"], "0.65"),
        (["--switch-sigma", "1.0"], "0.646"),
        (["--switch-step", "5"], "0.598"),
    ],
    ids=str,
)
def test_viewers_are_told_the_refiner_and_its_switch(
    options: list[str], switch: str, both: list[str], here: Path, tiny_refiner_file: Path
) -> None:
    """A share of the training steps in any case, as the web UI counts.

    Of the 1000 levels 646 are 1.0 or more; of 10 steps the sixth starts at t = 401, and the base owns those above.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert (np.cumprod(1 - betas) <= 0.5).sum() == 646  # sigma^2 = 1 / alpha_bar - 1
    assert main([*both, *options]) == 0
    found = fields(here / "generated.png")
    sha256 = hashlib.sha256(tiny_refiner_file.read_bytes()).hexdigest()
    assert found["Refiner"] == f"{tiny_refiner_file.stem} [{sha256[:10]}]"
    assert found["Refiner switch at"] == switch


def test_two_stages_have_a_refiner_and_no_switch(both: list[str], here: Path) -> None:
    assert main([*both, "--two-stage"]) == 0
    found = fields(here / "generated.png")
    assert "Refiner" in found
    assert "Refiner switch at" not in found
    assert found["Denoising strength"] == "0.3"


def test_markup_is_noted_once_for_both_stages(both: list[str], here: Path, capsys: Capture) -> None:
    assert main([*both, "--two-stage", "--negative-prompt", "<lora:x:1>"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: '<lora:x:1>' in a prompt is read as words")
    assert error.count("\n") == 1


def test_a_seed_of_minus_1_is_drawn_and_counted_up(base: list[str], here: Path, capsys: Capture) -> None:
    assert main([*base, "--seed", "-1", "--num-images", "2"]) == 0
    seed = int(capsys.readouterr().out.splitlines()[0].removeprefix("seed: "))
    made = [settings(here / f"generated-{i}.png")["seed"] for i in range(2)]
    assert made == [seed, seed + 1]


def test_low_memory_makes_the_same_bytes(both: list[str], here: Path) -> None:
    assert main([*both, "--out", "plain.png"]) == 0
    assert main([*both, "--out", "low.png", "--low-memory"]) == 0
    assert (here / "plain.png").read_bytes() == (here / "low.png").read_bytes()


def test_two_stages(both: list[str], base: list[str], here: Path, capsys: Capture) -> None:
    assert main([*both, "--two-stage", "--strength", "0.5", "--out", "two.png"]) == 0
    printed = capsys.readouterr().out
    assert "plan: base 10 of 10 steps" in printed
    assert "plan: refiner 5 of 10 steps" in printed
    assert settings(here / "two.png")["strength"] == 0.5
    assert main(base) == 0
    assert not np.array_equal(pixels(here / "two.png"), pixels(here / "generated.png"))


def test_a_model_of_v(both: list[str], here: Path) -> None:
    assert main([*both, "--out", "noise.png"]) == 0
    assert main([*both, "--out", "v.png", "--prediction", "v"]) == 0
    assert not np.array_equal(pixels(here / "noise.png"), pixels(here / "v.png"))
    assert settings(here / "v.png")["prediction"] == "v"


# --- files --------------------------------------------------------------------------------------------------------


def test_several_images_have_a_seed_each_and_a_sheet(base: list[str], here: Path) -> None:
    assert main([*base, "--num-images", "3", "--seed", "5", "--out", "many.png", "--save-latents", "l"]) == 0
    names = [f"many-{i}.png" for i in range(3)]
    assert sorted(path.name for path in here.iterdir()) == sorted(["l", "many.png", *names])
    assert [settings(here / name)["seed"] for name in names] == [5, 6, 7]
    assert Image.open("many.png").size == (2 * 72 + 8, 2 * 64 + 8)
    assert settings(here / "many.png")["images"] == 3
    assert load_file("l")["latents"].shape == (3, 4, 8, 9)
    assert main([*base, "--seed", "6", "--out", "alone.png"]) == 0
    difference = np.abs(pixels(here / names[1]).astype(int) - pixels(here / "alone.png"))
    assert difference.max() <= 1  # of 255: a batch sums in another order


def test_the_settings_tell_the_adapters_by_their_hashes(both: list[str], here: Path) -> None:
    layer = "lora_unet_middle_block_1_proj_in"
    save_file({f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(64, 1)}, "a.st")
    assert main([*both, "--lora", "a.st:0.5"]) == 0
    made = settings(here / "generated.png")
    assert made["lora"] == ["a.st:0.5"]
    assert made["lora_sha256"] == [hashlib.sha256((here / "a.st").read_bytes()).hexdigest()]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_picture_too_small_for_a_watermark_is_found_before_the_work(
    base: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "steps", stop)
    assert main([*base, "--watermark"]) == 2
    message = "sdxl-ref: error: a watermark needs a picture of 256x256 pixels or more, found 72x64\n"
    assert capsys.readouterr().err == message
    with pytest.raises(Stopped):
        main(base)


BAD = {
    "a refiner as base": (["--base", "REFINER"], "expected a base"),
    "a base as refiner": (["--refiner", "BASE"], "expected a refiner"),
    "score without a refiner": (["--aesthetic-score", "6"], "--aesthetic-score is the refiner's"),
    "switch without a refiner": (["--switch", "0.5"], "--switch is the refiner's"),
    "two stages without a refiner": (["--two-stage"], "--two-stage is the refiner's"),
    "strength without two stages": (["--refiner", "REFINER", "--strength", "0.5"], "give --two-stage too"),
    "switch of two stages": (["--refiner", "REFINER", "--two-stage", "--switch", "0.5"], "--two-stage has none"),
    "switch over 1": (["--refiner", "REFINER", "--switch", "1.5"], "at most 1, found 1.5"),
    "compiled in low memory": (["--compile", "--low-memory"], "--compile wants all networks in memory"),
    "two switches": (["--refiner", "REFINER", "--switch", "0.5", "--switch-step", "3"], "give one of them"),
    "no refiner step": (["--refiner", "REFINER", "--switch-sigma", "0.001"], "refiner would run 0 steps"),
    "height": (["--height", "65"], "height must be a multiple of 8, from 8 to 16384, found 65"),
    "width": (["--width", "16392"], "width must be a multiple of 8, from 8 to 16384, found 16392"),
    "no image": (["--num-images", "0"], "--num-images must be from 1 to 1000, found 0"),
    "images": (["--num-images", "1001"], "--num-images must be from 1 to 1000, found 1001"),
    "no folder": (["--out", "nowhere/x.png"], "existing, writable folder"),
    "a misspelt option": (["--swich", "0.5"], "unrecognized arguments: --swich 0.5: did you mean '--switch'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, base: list[str], here: Path, tiny_base_file: Path, tiny_refiner_file: Path, capsys: Capture
) -> None:
    words, message = BAD[case]
    files = {"BASE": str(tiny_base_file), "REFINER": str(tiny_refiner_file)}
    assert main([*base, *(files.get(word, word) for word in words)]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not list(here.iterdir())
