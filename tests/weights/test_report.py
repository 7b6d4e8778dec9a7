"""What is told of a checkpoint, by `sdxl-ref info` and `weights-convert inspect`: the same text from the same code."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_ref.cli import main as sdxl_ref
from sdxl_ref.config import InputError
from sdxl_ref.weights import report
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.identity import KNOWN_FILES
from sdxl_ref.weights.report import describe
from sdxl_ref.weights.tensor_files import sha256_of
from weights_convert.cli import main as weights_convert
from weights_convert.convert import convert

BIAS = "first_stage_model.decoder.conv_in.bias"


@pytest.fixture
def vae(small_refiner_file: Path, tmp_path: Path) -> Path:
    """The small refiner's autoencoder in a file of its own."""
    state = load_file(small_refiner_file)
    path = tmp_path / "vae.safetensors"
    save_file({key.split(".", 1)[1]: value for key, value in state.items() if key.startswith("first_stage")}, path)
    return path


def changed(source: Path, target: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() | metadata
    save_file(load_file(source) | tensors, target, metadata)
    return target


# --- one text -------------------------------------------------------------------------------------------------------


def test_both_commands_print_the_same(
    small_refiner_file: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a file, a folder, an autoencoder alone, and what is installed."""
    convert(small_refiner_file, tmp_path / "folder", "diffusers")
    for name in (small_refiner_file, tmp_path / "folder", vae, "pocket-refiner"):
        assert sdxl_ref(["info", str(name)]) == 0
        text = capsys.readouterr().out
        assert weights_convert(["inspect", str(name)]) == 0
        assert capsys.readouterr().out == text
        path = "pocket_refiner.safetensors" if name == "pocket-refiner" else str(name)
        assert f"{path}: " in text.splitlines()[0]


def test_the_text(small_base_file: Path, tmp_path: Path) -> None:
    sigmas = torch.zeros(1000)
    texts = {"a.short": "x" * 199, "a.long": "x" * 201, "a.strange": "red \x1b[31m\n\u202eback"}
    path = changed(small_base_file, tmp_path / "a.safetensors", {"denoiser.sigmas": sigmas}, **texts)
    lines = describe(path).lines()
    assert lines[0] == f"{path}: SDXL-like base"
    parts = ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert [line.split()[0] for line in lines[1:5]] == parts
    assert all(line.endswith(" parameters  F16") for line in lines[1:5])
    assert lines[5] == "extras: denoiser.sigmas"
    metadata = [f"a.long: {'x' * 200}…", f"a.short: {'x' * 199}", "a.strange: red ?[31m??back", "format: pt"]
    assert lines[6:-1] == metadata  # sorted, and without the configuration
    assert lines[-1].startswith("VAE: unknown, tensors sha256 ")


def test_a_note_is_told(small_refiner_file: Path, tmp_path: Path) -> None:
    save_file(load_file(small_refiner_file), tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors").lines()[1].startswith(f"note: no {CONFIG_KEY} in the metadata: ")


def test_the_json(small_refiner_file: Path, tmp_path: Path) -> None:
    extras = {"model_ema.b": torch.zeros(1), "denoiser.sigmas": torch.zeros(1000)}
    path = changed(small_refiner_file, tmp_path / "a.safetensors", extras, short="x" * 199, long="x" * 200)
    found = json.loads(json.dumps(describe(path).to_json()))
    assert list(found) == ["path", "model", "note", "parts", "extras", "vae", "metadata"]
    assert found["path"] == str(path)
    assert found["extras"] == ["denoiser.sigmas", "model_ema.b"]
    assert found["metadata"] == {"format": "pt", "short": "x" * 199}
    state = load_file(small_refiner_file)
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        tensors = [tensor for key, tensor in state.items() if key.startswith(prefix)]
        parameters = sum(tensor.numel() for tensor in tensors)
        assert found["parts"][part] == {"tensors": len(tensors), "parameters": parameters, "dtypes": ["float16"]}


def test_several_dtypes_are_all_told(small_refiner_file: Path, tmp_path: Path) -> None:
    names = ["model.diffusion_model.out.2.bias", "model.diffusion_model.out.2.weight"]
    state = load_file(small_refiner_file)
    mixed = {names[0]: state[names[0]].float(), names[1]: state[names[1]].to(torch.float8_e4m3fn)}
    part = describe(changed(small_refiner_file, tmp_path / "a.safetensors", mixed)).parts["unet"]
    assert part.line("unet").endswith("parameters  F16, F32, F8_E4M3")
    assert part.to_json()["dtypes"] == ["float16", "float32", "float8_e4m3fn"]


# --- a check --------------------------------------------------------------------------------------------------------


def test_a_check_adds_two_lines(small_refiner_file: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (small_refiner_file, vae):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        lines = describe(path).lines()
        checks = [f"sha256: {sha256} (not an official file)", "finite: every value of every tensor"]
        assert describe(path, check=True).lines() == [*lines[:-1], *checks, lines[-1]]
        monkeypatch.setitem(
            report.VAES if path == vae else KNOWN_FILES, sha256, "a name" if path == vae else ("b", "c")
        )
        lines = describe(path, check=True).lines()
        assert lines[-3] == f"sha256: {sha256} ({'a name' if path == vae else 'b'})"
        assert lines[-1].startswith("VAE: a name, file sha256 " if path == vae else "VAE: c, tensors sha256 ")


@pytest.mark.parametrize(
    ("kind", "value"),
    [("file", math.nan), ("file", math.inf), ("file", -math.inf), ("folder", math.inf), ("VAE", -math.inf)],
)
def test_a_check_names_tensors_that_are_not_finite(
    kind: str, value: float, small_refiner_file: Path, vae: Path, tmp_path: Path
) -> None:
    path = vae if kind == "VAE" else small_refiner_file
    name = BIAS.split(".", 1)[1] if kind == "VAE" else BIAS
    state = load_file(path)
    state[name][0] = value
    with safe_open(path, framework="pt") as file:
        save_file(state, tmp_path / "a.safetensors", file.metadata())
    damaged = tmp_path / "a.safetensors"
    if kind == "folder":
        damaged = tmp_path / "folder"
        convert(tmp_path / "a.safetensors", damaged, "diffusers")
    describe(damaged)  # the headers tell nothing of it
    with pytest.raises(InputError, match=f"1 tensors hold NaN or infinite values: {name}$"):
        describe(damaged, check=True)


def test_a_file_is_read_once(small_refiner_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "OFFICIAL_SIZES", (small_refiner_file.stat().st_size,))
    monkeypatch.setattr(report, "sha256_of", lambda *_: pytest.fail("it was read again"))
    monkeypatch.setattr(report.Checkpoint, "sha256", lambda _: pytest.fail("it was read again"))
    assert describe(small_refiner_file, check=True).checks[1] == "finite: every value of every tensor"


# --- which autoencoder ----------------------------------------------------------------------------------------------


def test_a_file_of_an_official_size_is_compared_with_the_official_ones(
    small_refiner_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other one is read for that."""
    monkeypatch.setitem(KNOWN_FILES, sha256_of(small_refiner_file), ("some_file", "0.9"))
    assert describe(small_refiner_file).vae.startswith("unknown, tensors sha256 ")
    monkeypatch.setattr(report, "OFFICIAL_SIZES", (small_refiner_file.stat().st_size,))
    assert describe(small_refiner_file).vae.startswith("0.9, tensors sha256 ")


def test_an_autoencoder_alone(vae: Path, small_refiner_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = describe(vae)
    assert description.model == "an SDXL autoencoder (by its keys)"
    assert list(description.parts) == ["vae"]
    assert description.vae == f"unknown, file sha256 {sha256_of(vae)}"
    monkeypatch.setitem(report.VAES, sha256_of(vae), "a known one")
    assert describe(vae).vae == f"a known one, file sha256 {sha256_of(vae)}"


# --- bad input ------------------------------------------------------------------------------------------------------


def test_dtypes_that_no_weights_have(vae: Path) -> None:
    vae.write_bytes(vae.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"', 1))
    with pytest.raises(InputError, match=r"vae\.safetensors: .* has the dtype U16, expected one of F64, F32, F16"):
        describe(vae)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    for name, message in {
        "a.ckpt": "is a pickle",
        "a.safetensors": "expected a whole safetensors file",
        "none": "no such checkpoint",
        "x" * 300: "no such checkpoint",
    }.items():
        with pytest.raises(InputError, match=message):
            describe(tmp_path / name)
