"""Every case of bad input to `refine` is one line on standard error, status 2, and no file."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refine, assert_one_line
from peers import TINY_REFINER
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.stated_config import config_to_json

Changes = dict[str, Any]
Case = Callable[[Path, Path], Changes]  # (folder to put files into, good checkpoint) -> changes to the command


def given(**changes: Any) -> Case:
    return lambda folder, good: changes


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Case:
    """The good checkpoint with its tensors edited."""

    def case(folder: Path, good: Path) -> Changes:
        state = load_file(good)
        edit(state)
        save_file(state, folder / "edited.safetensors", {CONFIG_KEY: config_to_json(TINY_REFINER)})
        return {"checkpoint": folder / "edited.safetensors"}

    return case


def content(edit: Callable[[bytes], bytes], name: str = "edited.safetensors") -> Case:
    """A file of the good checkpoint's bytes, edited."""

    def case(folder: Path, good: Path) -> Changes:
        (folder / name).write_bytes(edit(good.read_bytes()))
        return {"checkpoint": folder / name}

    return case


def other_model(folder: Path, good: Path) -> Changes:
    save_file({"unet.x": torch.ones(1)}, folder / "a.safetensors")
    return {"checkpoint": folder / "a.safetensors"}


def poisoned(key: str, value: float = math.nan, rows: slice = slice(None)) -> Case:
    def edit(state: dict[str, torch.Tensor]) -> None:
        state[key][rows] = value

    return weights(edit)


def folder_of(*names: str) -> Case:
    def case(folder: Path, good: Path) -> Changes:
        (folder / "weights").mkdir()
        for name in names:
            (folder / "weights" / name).write_bytes(b"")
        return {"checkpoint": folder / "weights"}

    return case


def picture(data: bytes | Image.Image) -> Case:
    def case(folder: Path, good: Path) -> Changes:
        path = folder / "in.png"
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            data.save(path)
        return {"image": path}

    return case


def check(
    case: tuple[Case, str], refine: Refine, here: Path, tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = case
    assert refine(**{"out": "out.png"} | make(tmp_path, good)) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert os.listdir(here) == []


def pipe(folder: Path, good: Path) -> Changes:
    """Which nobody writes into."""
    os.mkfifo(folder / "in.png")
    return {"image": folder / "in.png"}


# --- the checkpoint -----------------------------------------------------------------------------------------------

NORM = "first_stage_model.decoder.norm_out.weight"
UNFINISHED = "returned values that are not finite"
IN_THE_UNET = f"the UNet, on the step to sigma 0.04131, {UNFINISHED}"
CHECKPOINTS: dict[str, tuple[Case, str]] = {
    "no safetensors": (content(lambda data: b"hello" * 99), "expected a whole safetensors file, could not read"),
    "truncated": (content(lambda data: data[:-1]), "expected a whole safetensors file, could not read"),
    "a header that is no JSON": (
        content(lambda data: struct.pack("<Q", 4) + b"{'a'"),
        "expected a whole safetensors file, could not read",
    ),
    "a missing key": (weights(lambda s: s.pop(NORM)), f"do not fit: 1 missing: {NORM}"),
    "an unexpected key": (weights(lambda s: s.update(x=torch.ones(1))), "do not fit: 1 unexpected: x"),
    "weights of whole numbers": (
        weights(lambda s: s.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"expected weights in floating point, found 1 others, as {NORM}",
    ),
    "a misshapen key": (
        weights(lambda s: s.update({NORM: torch.ones(7)})),
        f"do not fit: 1 of another shape: {NORM} (expected 32, found 7)",
    ),
    "another model": (other_model, "is no SDXL checkpoint in the official layout"),
    "a pickle": (content(lambda data: data, "a.ckpt"), "a.ckpt is a pickle, which can run any code when opened"),
    "a missing file": (given(checkpoint="none.safetensors"), "no such checkpoint: none.safetensors"),
    "an empty folder": (folder_of(), "expected one .safetensors file in the folder"),
    "a folder of pickles": (folder_of("model.bin", "config.json"), "expected one .safetensors file in the folder"),
    "a folder of two": (folder_of("a.safetensors", "b.safetensors"), "found a.safetensors, b.safetensors"),
    "NaN in the UNet": (poisoned("model.diffusion_model.out.2.bias"), IN_THE_UNET),
    "NaN deep in the UNet": (
        poisoned("model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.bias"),
        IN_THE_UNET,
    ),
    "infinity in the UNet": (poisoned("model.diffusion_model.out.2.bias", math.inf), IN_THE_UNET),
    "NaN in the text encoder": (
        poisoned("conditioner.embedders.0.model.positional_embedding"),
        f"the text encoder {UNFINISHED}",
    ),
    "NaN in the last text block": (
        poisoned("conditioner.embedders.0.model.ln_final.weight"),
        f"the text encoder's pooled vector {UNFINISHED}",
    ),
    "NaN in the VAE's encoder": (poisoned("first_stage_model.encoder.conv_in.bias"), f"the VAE's encoder {UNFINISHED}"),
    "NaN in the VAE's log variances": (
        poisoned("first_stage_model.quant_conv.bias", rows=slice(4, 8)),
        f"the VAE's encoder {UNFINISHED}",
    ),
    "NaN in the VAE's decoder": (
        poisoned("first_stage_model.decoder.conv_out.bias"),
        f"the VAE's decoder {UNFINISHED}",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint(
    case: str, refine: Refine, here: Path, tmp_path: Path, tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(CHECKPOINTS[case], refine, here, tmp_path, tiny_refiner_file, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "BASE"}, "name the model by --checkpoint, or both of an ensemble by --base and --refiner"),
        ({"checkpoint": None, "base": "BASE"}, "name the model by --checkpoint, or both"),
        ({"checkpoint": None, "base": "BASE", "refiner": "BASE"}, "expected a refiner"),
        ({"switch": 0.5}, "--switch is the ensemble's: give --base and --refiner, or leave it out"),
        ({"prompt_2": "a dog"}, "prompt_2 is of no use to an SDXL refiner"),
        ({"checkpoint": "BASE", "aesthetic_score": 7}, "aesthetic_score is of no use to an SDXL base"),
        ({"mask": "missing.png"}, "no such picture: missing.png"),
    ],
    ids=str,
)
def test_models_and_masks(
    changes: Changes, message: str, refine: Refine, here: Path, tiny_base_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {name: tiny_base_file if value == "BASE" else value for name, value in changes.items()}
    assert refine(**changes) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert os.listdir(here) == []


# --- the picture --------------------------------------------------------------------------------------------------

TIFF = b"II*\0\x08\0\0\0\x02\0\0\x01\x03\0\xff\xff\xff\x7f\x40\0\0\0"  # Pillow warns, then it refuses
PICTURES: dict[str, tuple[Case, str]] = {
    "no picture": (picture(b"hello"), "expected a picture (PNG, JPEG, WebP, …), could not read"),
    "a damaged TIFF": (picture(TIFF), "expected a picture (PNG, JPEG, WebP, …), could not read"),
    "a missing picture": (given(image="none.png"), "no such picture: none.png"),
    "a folder as picture": (given(image="."), "expected a picture"),
    "1 pixel wide": (picture(Image.new("RGB", (1, 500))), "expected a picture of at least 8x8 pixels, found 1x500"),
    "7 pixels high": (picture(Image.new("RGB", (500, 7))), "expected a picture of at least 8x8 pixels, found 500x7"),
    "a pipe as picture": (pipe, "a folder, a pipe or a device is no picture: give a file"),
    "a small one with a watermark": (given(watermark=True), "needs a picture of 256x256 pixels or more, found 64x64"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_bad_picture(
    case: str, refine: Refine, here: Path, tmp_path: Path, tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(PICTURES[case], refine, here, tmp_path, tiny_refiner_file, capsys)


# --- the options --------------------------------------------------------------------------------------------------

NUMBERS: list[tuple[Changes, str]] = [
    *(
        ({"strength": value}, f"strength must be above 0 and at most 1, found {found}")
        for value, found in (("0", "0.0"), ("-0.5", "-0.5"), ("1.01", "1.01"), ("nan", "nan"), ("inf", "inf"))
    ),
    ({"strength": "a lot"}, "argument --strength: invalid float value: 'a lot'"),
    ({"steps": 0}, "the number of steps must be a whole number from 1 to 1000, found 0"),
    ({"steps": -1}, "the number of steps must be a whole number from 1 to 1000, found -1"),
    ({"steps": 1001}, "the number of steps must be a whole number from 1 to 1000, found 1001"),
    ({"steps": 1000}, '"leading" with 1000 steps leaves the 1000 training steps'),
    ({"steps": 2.5}, "argument --steps: invalid int value: '2.5'"),
    ({"steps": 1}, "runs 0 steps: the smallest strength is 1.0"),
    ({"steps": 10, "strength": 0.09}, "runs 0 steps: the smallest strength is 0.1"),
    ({"steps": 10, "strength": 0.1, "strength_rule": "sgm"}, "runs 0 steps: the smallest strength is 0.1819"),
    *(
        ({"seed": value}, f"argument --seed: expected a whole number from -2^63 to 2^64 - 1, found {value}")
        for value in (2**64, -(2**63) - 1)
    ),
    ({"seed": "a lot"}, "argument --seed: invalid seed value: 'a lot'"),
    *(
        ({"guidance_rescale": value}, f"guidance_rescale must be from 0 to 1, found {float(value)}")
        for value in ("-0.1", "1.1", "nan", "inf")
    ),
    ({"guidance_scale": "inf"}, "guidance_scale must be a finite number, found inf"),
    ({"aesthetic_score": "nan"}, "aesthetic_score must be a finite number, found nan"),
    ({"eta": 0.5}, "eta is of no use to the sampler euler: leave it out"),
    ({"sampler": "ddim", "s_churn": 1}, "s_churn is of no use to the sampler ddim: leave it out"),
    ({"sampler": "ddim", "eta": -1}, "eta must be a number from 0 to a million, found -1.0"),
]
WORDS: list[tuple[Changes, str]] = [
    ({"sampler": "banana"}, "unknown sampler 'banana': expected one of euler, "),
    ({"sampler": "DPM++ 2M Karras"}, "is called dpmpp_2m here: write --sampler dpmpp_2m --karras --spacing linspace"),
    ({"spacing": "banana"}, "unknown spacing 'banana': expected one of leading, trailing, linspace, sgm"),
    ({"strength_rule": "banana"}, "unknown strength rule 'banana': expected one of exact, sgm"),
    ({"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
    ({"prediction": "x0"}, "argument --prediction: invalid choice: 'x0'"),
    *(
        ({"device": name}, f"device '{name}' is not to be had: expected auto, cpu, cuda or mps")
        for name in ("banana", "", "cuda:99", "meta", "hpu", "xla", "cpu:-1")
    ),
    ({"banana": 1}, "unrecognized arguments: --banana"),
    ({"prompt": None}, "the following arguments are required: --prompt"),
    ({"checkpoint": None}, "name the model by --checkpoint, or both of an ensemble by --base and --refiner"),
    ({"lora": "none.safetensors"}, "none.safetensors"),
    ({"lora": "a.safetensors:nan"}, "the scale of an adapter must be a finite number, found a.safetensors:nan"),
]


@pytest.mark.parametrize(("changes", "message"), NUMBERS + WORDS, ids=str)
def test_bad_options(
    changes: Changes, message: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(**{"out": "out.png"} | changes) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert os.listdir(here) == []
