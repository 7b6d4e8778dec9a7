"""Parts that come from files of their own, and dtypes that no weights have."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cases import diagonal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.cli import main
from weights_convert.convert import convert


def test_a_separate_autoencoder_takes_the_place(official: Path, converted: Path, tmp_path: Path) -> None:
    """In official names, bare and with their prefix, and in diffusers', all the same bits."""
    changed = {key: value + 1 for key, value in load_file(official).items() if key.startswith("first_stage_model.")}
    theirs = load_file(converted / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae").mkdir()
    save_file(changed, tmp_path / "prefixed.safetensors")
    bare = {key.removeprefix("first_stage_model."): value for key, value in changed.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file({key: value + 1 for key, value in theirs.items()}, tmp_path / "vae" / "a.safetensors")
    expected = load_file(official) | changed
    for vae in ("prefixed.safetensors", "bare.safetensors", "vae"):
        convert(official, tmp_path / "out.safetensors", "official", vae=tmp_path / vae, force=True)
        assert_close(load_file(tmp_path / "out.safetensors"), expected, rtol=0, atol=0)


def test_open_clips_own_file_takes_the_place(official: Path, tmp_path: Path) -> None:
    state = load_file(official)
    prefix = next(key for key in state if key.endswith("model.text_projection")).removesuffix("text_projection")
    own = {k.removeprefix(prefix): v.float() * 2 for k, v in state.items() if k.startswith(prefix)}
    renamed = {k if k == "logit_scale" else f"text.{k}": v for k, v in own.items()}
    for name, tensors in (("plain", own), ("newer", renamed)):
        save_file(tensors | {"visual.conv1.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        convert(official, tmp_path / f"out_{name}.safetensors", "official", openclip=tmp_path / f"{name}.safetensors")
        found = load_file(tmp_path / f"out_{name}.safetensors")
        assert_close({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}, own, rtol=0, atol=0)


@pytest.mark.parametrize("own", [2.5, None], ids=["with a scale", "without"])
@pytest.mark.parametrize(("there", "to"), diagonal([True, False], ["official", "diffusers"]))
def test_open_clips_scale_is_carried_where_it_has_one(
    tiny_refiner_file: Path, tmp_path: Path, own: float | None, there: bool, to: str
) -> None:
    prefix = "conditioner.embedders.0.model."
    state = load_file(tiny_refiner_file)
    tower = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    first = float(tower.pop("logit_scale"))
    save_file(tower | ({} if own is None else {"logit_scale": torch.tensor(own)}), tmp_path / "clip.safetensors")
    with safe_open(tiny_refiner_file, framework="pt") as file:
        metadata = file.metadata()
    source = {key: value for key, value in state.items() if there or not key.endswith("logit_scale")}
    save_file(source, tmp_path / "source.safetensors", metadata)
    target = tmp_path / ("out.safetensors" if to == "official" else "out")
    report = str(convert(tmp_path / "source.safetensors", target, to, openclip=tmp_path / "clip.safetensors"))
    assert ("logit_scale: not in" in report) == (own is None)
    assert (f"{prefix}logit_scale: not in the source, written as ln 100" in report) == (
        own is None and not there and to == "official"
    )
    opened = open_checkpoint(target)
    expected = own or (first if there else math.log(100) if to == "official" else None)
    assert (prefix + "logit_scale" in opened.shapes) == (expected is not None)
    if expected is not None:
        with opened.reader() as read:
            assert float(read(prefix + "logit_scale")) == pytest.approx(expected, rel=1e-3)


def test_dtypes_that_no_weights_have(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One tensor of a part is of unsigned whole numbers, as its header says."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"', 1))
    name = next(key for key, value in load_file(path).items() if value.dtype == torch.uint16)
    for words in (
        ["inspect", folder],
        ["inspect", folder / "vae"],
        ["verify", folder],
        ["diff", folder, folder],
        ["convert", folder, tmp_path / "out.safetensors", "--to", "official"],
        ["lora", "extract", folder, folder, "--rank", "1", "--out", tmp_path / "out.safetensors"],
    ):
        assert main([str(word) for word in words]) == 2, words
        assert f"{name} has the dtype U16, expected one of F64, F32, F16" in capsys.readouterr().err


def test_a_separate_autoencoder_of_such_a_dtype(
    tiny_refiner_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"', 1))
    words = ["convert", tiny_refiner_file, tmp_path / "out.safetensors", "--to", "official", "--vae", path]
    assert main([str(word) for word in words]) == 2
    assert "decoder.conv_in.bias has the dtype U16, expected one of F64, F32, F16" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_q_k_and_v_of_several_dtypes_make_a_tensor_that_holds_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "text_encoder_2" / "model.safetensors"
    state = load_file(path)
    q, k, v = (f"text_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    save_file(state | {k: state[k].float() + 1e-6, v: state[v].bfloat16()}, path)
    convert(folder, tmp_path / "a.safetensors", "official")
    found = load_file(tmp_path / "a.safetensors")[
        "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight"
    ]
    expected = torch.cat([state[q].float(), state[k].float() + 1e-6, state[v].bfloat16().float()])
    assert_close(found, expected, rtol=0, atol=0)
    save_file(state | {k: state[k].to(torch.float8_e4m3fn)}, path)
    assert main(["convert", str(folder), str(tmp_path / "b.safetensors"), "--to", "official"]) == 2
    assert "have several dtypes: F16, F8_E4M3, F16" in capsys.readouterr().err


def test_a_separate_autoencoder_brings_its_scaling_factor_where_it_says_one(
    official: Path, converted: Path, tmp_path: Path
) -> None:
    """By its `config.json`; a plain file says none, and the model's own stays. Also out of a whole model's folder."""
    scale = open_checkpoint(official).config.vae.scale_factor
    shutil.copytree(converted, tmp_path / "model")
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    convert(tmp_path / "model" / "vae", tmp_path / "plain.safetensors", "official")
    save_file(load_file(tmp_path / "plain.safetensors"), tmp_path / "plain.safetensors")  # without metadata
    for vae, expected in ((tmp_path / "model", 0.5), (config.parent, 0.5), (tmp_path / "plain.safetensors", scale)):
        report = str(convert(official, tmp_path / "a.safetensors", "official", vae=vae, force=True))
        assert open_checkpoint(tmp_path / "a.safetensors").config.vae.scale_factor == expected
        assert ("vae: the scaling factor 0.5 of" in report) == (expected == 0.5)
        convert(converted, tmp_path / "folder", "diffusers", vae=vae, force=True)
        assert open_checkpoint(tmp_path / "folder").config.vae.scale_factor == expected


@pytest.mark.parametrize("option", ["--vae", "--openclip"])
def test_a_file_that_holds_no_such_part(
    option: str, tiny_refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, tmp_path / "a.safetensors")
    words = [
        "convert",
        tiny_refiner_file,
        tmp_path / "b.safetensors",
        "--to",
        "official",
        option,
        tmp_path / "a.safetensors",
    ]
    assert main([str(word) for word in words]) == 2
    part = "autoencoder" if option == "--vae" else "OpenCLIP bigG text encoder"
    assert capsys.readouterr().err == f"weights-convert: error: {tmp_path / 'a.safetensors'} holds no {part}\n"
