"""`sdxl-ref info`: what a checkpoint is, from its header; with a check, from one pass over all of it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from command_line import assert_one_line
from peers import TINY_BASE, TINY_REFINER
from safetensors.torch import load_file, save_file

from sdxl_ref.cli import main
from sdxl_ref.weights.checkpoint import CONFIG_KEY, build_empty, prefixes
from sdxl_ref.weights.opening import POCKET
from sdxl_ref.weights.stated_config import config_to_json
from weights_convert.cli import main as convert_command

Capture = pytest.CaptureFixture[str]
CONFIGS = {"refiner": TINY_REFINER, "base": TINY_BASE}
FINITE = "finite: every value of every tensor"
METADATA = {CONFIG_KEY: config_to_json(TINY_REFINER)}


def parameters(kind: str, part: str) -> str:
    return f"{sum(p.numel() for p in build_empty(part, CONFIGS[kind]).parameters()):,} parameters"


def lines_of(words: list[str], capsys: Capture) -> list[str]:
    assert main(["info", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


@pytest.mark.parametrize("kind", CONFIGS)
def test_parts_sizes_dtypes_extras_and_vae(
    kind: str, tiny_refiner_file: Path, tiny_base_file: Path, capsys: Capture
) -> None:
    path = tiny_refiner_file if kind == "refiner" else tiny_base_file
    first, *parts, extras, form, vae = lines_of([str(path)], capsys)
    assert first == f"{path}: SDXL-like {kind}"
    assert [line.split()[0] for line in parts] == list(prefixes(CONFIGS[kind]))
    for line in parts:
        assert parameters(kind, line.split()[0]) in line
        assert line.endswith("parameters  F16")
    assert extras == "extras: none"
    assert form == "format: pt"
    assert vae.startswith("VAE: unknown, tensors sha256 ")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_pocket_pair(kind: str, capsys: Capture) -> None:
    first, *_ = lines_of([f"pocket-{kind}"], capsys)
    assert first == f"{POCKET[f'pocket-{kind}']}: SDXL-like {kind}"


def test_a_check_tells_the_hash_and_that_all_is_finite(tiny_refiner_file: Path, capsys: Capture) -> None:
    lines = lines_of([str(tiny_refiner_file), "--check"], capsys)
    sha256 = hashlib.sha256(tiny_refiner_file.read_bytes()).hexdigest()
    assert f"sha256: {sha256} (not an official file)" in lines
    assert FINITE in lines


@pytest.mark.parametrize(
    ("extra", "title", "printed"),
    [
        ("denoiser.sigmas", ("modelspec.title", "a small one"), ("denoiser.sigmas", "modelspec.title: a small one")),
        (
            "model_ema.\x1b[31m",
            ("title\x1b[2J", "red \x1b[31m\r\nsha256: \u202e0"),
            ("model_ema.?[31m", "title?[2J: red ?[31m??sha256: ?0"),
        ),
    ],
    ids=["plain", "control characters"],
)
def test_extras_and_metadata_are_named(
    here: Path, tiny_refiner_file: Path, capsys: Capture, extra: str, title: tuple[str, str], printed: tuple[str, str]
) -> None:
    state = load_file(tiny_refiner_file) | {extra: torch.ones(1000)}
    save_file(state, "a.safetensors", METADATA | {title[0]: title[1]})
    lines = lines_of(["a.safetensors"], capsys)
    assert f"extras: {printed[0]}" in lines
    assert printed[1] in lines
    assert all(line.isprintable() for line in lines)


@pytest.fixture(scope="module")
def folder(tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The refiner in diffusers' layout."""
    path = tmp_path_factory.mktemp("folders") / "model"
    assert convert_command(["convert", str(tiny_refiner_file), str(path), "--to", "diffusers"]) == 0
    return path


def test_a_folder(folder: Path, capsys: Capture) -> None:
    first, *lines = lines_of([str(folder), "--check"], capsys)
    assert first == f"{folder}: SDXL-like refiner"
    assert any(line.startswith("unet ") and parameters("refiner", "unet") in line for line in lines)
    assert FINITE in lines


VALUES = [math.nan, math.inf, -math.inf]
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@pytest.mark.parametrize(("dtype", "name"), DTYPES.items(), ids=str)
def test_a_check_names_tensors_that_are_not_finite(
    dtype: torch.dtype, name: str, here: Path, tiny_refiner_file: Path, capsys: Capture
) -> None:
    """The header alone tells nothing of it."""
    state = load_file(tiny_refiner_file)
    key = "first_stage_model.decoder.conv_in.weight"
    for value in VALUES if dtype.itemsize > 1 else VALUES[:1]:  # the shorter of the 8-bit ones has no infinity
        tensor = state[key].float()
        tensor[-1, -1, -1, -1] = value
        save_file(state | {key: tensor.to(dtype)}, "a.safetensors", METADATA)
        assert main(["info", "a.safetensors", "--check"]) == 2
        captured = capsys.readouterr()
        assert_one_line(captured.err, f"a.safetensors: 1 tensors hold NaN or infinite values: {key}")
        assert captured.out == ""
        [vae] = [line for line in lines_of(["a.safetensors"], capsys) if line.startswith("vae ")]
        assert name in vae


def test_a_check_of_a_folder_names_the_official_key(folder: Path, here: Path, capsys: Capture) -> None:
    import shutil

    shutil.copytree(folder, "model")
    vae = Path("model", "vae", "diffusion_pytorch_model.safetensors")
    state = load_file(vae)
    state["decoder.conv_in.bias"][0] = math.nan
    save_file(state, vae, {"format": "pt"})
    assert main(["info", "model", "--check"]) == 2
    assert_one_line(
        capsys.readouterr().err, "1 tensors hold NaN or infinite values: first_stage_model.decoder.conv_in.bias"
    )
