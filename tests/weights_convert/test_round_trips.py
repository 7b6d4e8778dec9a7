"""From the official file to diffusers' folder and back: bit for bit, extras and metadata included."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.cli import main
from weights_convert.convert import convert
from weights_convert.reports import own_hash
from weights_convert.stream import EMPTY_HASH, HASH_KEY


def test_round_trip_is_bit_identical(official: Path, tmp_path: Path) -> None:
    report = convert(official, tmp_path / "folder", "diffusers")
    assert "which the layout has no place for" in str(report)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "official")
    assert_close(load_file(tmp_path / "back.safetensors"), load_file(official), rtol=0, atol=0)
    with safe_open(tmp_path / "back.safetensors", framework="pt") as file:
        metadata = file.metadata()
    kind = open_checkpoint(official).config.kind
    assert metadata["modelspec.architecture"] == f"stable-diffusion-xl-v1-{kind}"
    assert metadata.get("modelspec.timestep_range") == ("0,199" if kind == "refiner" else None)
    assert metadata["modelspec.author"] == "a test"
    assert main(["verify", str(tmp_path / "back.safetensors")]) == 0


def test_a_folder_without_our_extras_gets_the_defaults_and_the_report_says_so(
    official: Path, converted: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted, tmp_path / "folder")
    (tmp_path / "folder" / EXTRAS_FILE).unlink()
    report = str(convert(tmp_path / "folder", tmp_path / "back.safetensors", "official"))
    assert "logit_scale: not in the source, written as ln 100" in report
    assert "denoiser.sigmas: not in the source, written as SDXL's schedule" in report
    back = load_file(tmp_path / "back.safetensors")
    first = load_file(official)
    assert back.keys() == {key for key in first if "position_ids" not in key and "model_ema" not in key}
    changed = {key for key in back if not torch.equal(back[key], first[key])}
    assert changed == {"denoiser.sigmas"}
    assert torch.allclose(back["denoiser.sigmas"][-1].float(), torch.tensor(14.6146), atol=1e-2)


def test_float8_goes_there_and_back(small_refiner_file: Path, tmp_path: Path) -> None:
    kinds = {"model.diffusion_model.": torch.float8_e4m3fn, "first_stage_model.": torch.float8_e5m2}
    state = {
        key: value.to(next((dtype for prefix, dtype in kinds.items() if key.startswith(prefix)), value.dtype))
        for key, value in load_file(small_refiner_file).items()
    }
    with safe_open(small_refiner_file, framework="pt") as file:
        save_file(state, tmp_path / "small.safetensors", file.metadata())
    convert(tmp_path / "small.safetensors", tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "official")
    back = load_file(tmp_path / "back.safetensors")
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key].float(), value.float()), key
    assert main(["verify", str(tmp_path / "back.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "small.safetensors"), str(tmp_path / "folder")]) == 0


def test_the_hash_goes_into_its_own_field(small_refiner_file: Path, tmp_path: Path) -> None:
    """Fields before it that say what stands in its place until it is known keep what they say."""
    with safe_open(small_refiner_file, framework="pt") as file:
        metadata = file.metadata() | {"a.note": EMPTY_HASH, "a.quote": f'"{HASH_KEY}":"{EMPTY_HASH}"'}
    save_file(load_file(small_refiner_file), tmp_path / "source.safetensors", metadata)
    convert(tmp_path / "source.safetensors", tmp_path / "out.safetensors", "official")
    found = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert {name: found[name] for name in metadata} == metadata
    assert found[HASH_KEY] != EMPTY_HASH
    [verdict] = own_hash(open_checkpoint(tmp_path / "out.safetensors"))
    assert verdict.holds
