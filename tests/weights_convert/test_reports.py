"""inspect, verify and diff, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_convert.cli import main
from weights_convert.convert import convert, model_spec
from weights_convert.stream import HASH_KEY


@pytest.fixture
def own(small_refiner_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    convert(small_refiner_file, path, "official")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_inspect(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", own)
    assert status == 0
    assert "SDXL-like refiner" in out
    assert "modelspec.timestep_range: 0,199" in out
    found = json.loads(run(capsys, "inspect", own, "--json")[1])
    assert found["parts"]["unet"]["dtypes"] == ["float16"]
    state = load_file(own)
    expected = sum(t.numel() for key, t in state.items() if key.startswith("model.diffusion_model."))
    assert found["parts"]["unet"]["parameters"] == expected
    assert found["vae"].startswith("unknown, tensors sha256 ")


def test_verify_finds_damage(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", own)[0] == 0
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(data)
    status, out, _ = run(capsys, "verify", flipped)
    assert status == 1
    assert "ModelSpec hash" in out
    assert "NO" in out
    state = load_file(own)
    state["model.diffusion_model.out.2.bias"][0] = torch.nan
    metadata = {k: v for k, v in model_spec(peers_config(own)).items() if k != HASH_KEY}
    save_file(state, tmp_path / "nan.safetensors", metadata)
    status, out, _ = run(capsys, "verify", tmp_path / "nan.safetensors", "--json")
    assert status == 1
    verdict = json.loads(out)[-1]
    assert verdict == {
        "check": "finite values",
        "holds": False,
        "found": "1 tensors hold NaN or infinity: model.diffusion_model.out.2.bias",
    }


def peers_config(path: Path) -> object:
    from sdxl_ref.checkpoint import open_checkpoint

    return open_checkpoint(path).config


def test_diff_across_layouts(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(own, tmp_path / "folder", "diffusers")
    status, out, _ = run(capsys, "diff", own, tmp_path / "folder")
    assert status == 0
    assert "0 differ" in out
    state = load_file(own)
    key = "model.diffusion_model.out.2.weight"
    state[key] = state[key] * 1.5
    from safetensors import safe_open

    with safe_open(own, framework="pt") as file:
        save_file(state, tmp_path / "changed.safetensors", file.metadata())
    status, out, _ = run(capsys, "diff", tmp_path / "folder", tmp_path / "changed.safetensors", "--json")
    assert status == 1
    [change] = json.loads(out)["different"]
    assert change["key"] == key
    assert change["relative"] == pytest.approx(0.5, rel=1e-2)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], small_refiner_file: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"x")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    for words in (
        ["inspect", tmp_path / "none.safetensors"],
        ["inspect", tmp_path / "x.ckpt"],
        ["verify", tmp_path / "x.safetensors"],
        ["convert", small_refiner_file, tmp_path / "out"],
        ["convert", small_refiner_file, tmp_path / "out", "--to", "onnx"],
        ["diff", small_refiner_file],
        ["unknown"],
        [],
    ):
        status, out, err = run(capsys, *words)
        assert status == 2, words
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("weights-convert: error: ")
