"""From the official file to diffusers' folder and back: bit for bit, extras and metadata included."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sdxl_ref.weights.checkpoint import CONFIG_KEY, SETTINGS_KEY
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from sdxl_ref.weights.stated_config import config_from_json, config_to_json
from sdxl_ref.weights.streaming import EMPTY_HASH, HASH_KEY
from weights_convert.cli import main
from weights_convert.convert import convert
from weights_convert.reports import own_hash


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


def test_the_hash_goes_into_its_own_field(tiny_refiner_file: Path, tmp_path: Path) -> None:
    """Fields before it that say what stands in its place until it is known keep what they say."""
    with safe_open(tiny_refiner_file, framework="pt") as file:
        metadata = file.metadata() | {"a.note": EMPTY_HASH, "a.quote": f'"{HASH_KEY}":"{EMPTY_HASH}"'}
    save_file(load_file(tiny_refiner_file), tmp_path / "source.safetensors", metadata)
    convert(tmp_path / "source.safetensors", tmp_path / "out.safetensors", "official")
    found = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert {name: found[name] for name in metadata} == metadata
    assert found[HASH_KEY] != EMPTY_HASH
    [verdict] = own_hash(open_checkpoint(tmp_path / "out.safetensors"))
    assert verdict.holds


# --- the same set of tensors, and what the file said -----------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def there_and_back(source: Path, folder: Path) -> Path:
    convert(source, folder / "model", "diffusers")
    convert(folder / "model", folder / "back.safetensors", "official")
    return folder / "back.safetensors"


@pytest.mark.parametrize("name", POCKET)
def test_the_pocket_pair_goes_there_and_back(name: str, tmp_path: Path) -> None:
    back = there_and_back(Path(name), tmp_path)
    assert_close(load_file(back), load_file(POCKET[name]), rtol=0, atol=0)
    assert metadata_of(back).items() >= metadata_of(POCKET[name]).items()
    again = tmp_path / "again"
    again.mkdir()
    assert metadata_of(there_and_back(back, again)) == metadata_of(back)


EXTRAS_GONE = ["denoiser.sigmas", "logit_scale", "denoiser.sigmas|logit_scale|model_ema.decay"]


@pytest.mark.parametrize("without", sample(EXTRAS_GONE, EXTRAS_GONE[-1]))
def test_what_a_file_has_not_it_has_not_afterwards(official: Path, tmp_path: Path, without: str) -> None:
    state = {key: value for key, value in load_file(official).items() if not key.endswith(tuple(without.split("|")))}
    metadata = metadata_of(official) | {"modelspec.title": "A fine-tune", "ss_tag_frequency": "{}"}
    save_file(state, tmp_path / "a.safetensors", metadata)
    back = there_and_back(tmp_path / "a.safetensors", tmp_path)
    assert_close(load_file(back), state, rtol=0, atol=0)
    assert metadata_of(back).items() >= metadata.items()


def test_a_folder_of_ours_is_copied_with_all_that_it_had(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "first", "diffusers")
    convert(tmp_path / "first", tmp_path / "second", "diffusers")
    names = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "second") for path in (tmp_path / "second").rglob("*") if path.is_file()
    )
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


# --- the configuration that was read ---------------------------------------------------------------------------------


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fields_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


def test_an_edited_scaling_factor_survives(folder: Path, tmp_path: Path) -> None:
    """Although the folder was made of a file whose metadata say another one."""
    assert CONFIG_KEY in open_checkpoint(folder).metadata
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    convert(folder, tmp_path / "a.safetensors", "official")
    assert open_checkpoint(tmp_path / "a.safetensors").config.vae.scale_factor == 0.5
    assert config_from_json(metadata_of(tmp_path / "a.safetensors")[CONFIG_KEY]).vae.scale_factor == 0.5
    for source, target in ((tmp_path / "a.safetensors", tmp_path / "b"), (folder, tmp_path / "c")):
        convert(source, target, "diffusers")
        assert fields_of(target / "vae" / "config.json")["scaling_factor"] == 0.5
        assert open_checkpoint(target).config.vae.scale_factor == 0.5


@pytest.mark.parametrize(
    ("file", "field", "value"), [("unet", "sample_size", 64), ("text_encoder_2", "hidden_act", "quick_gelu")]
)
def test_other_edited_sizes_survive(folder: Path, tmp_path: Path, file: str, field: str, value: Any) -> None:
    edit(folder / file / "config.json", **{field: value})
    expected = open_checkpoint(folder).config
    convert(folder, tmp_path / "a.safetensors", "official")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    assert open_checkpoint(tmp_path / "a.safetensors").config == expected
    assert open_checkpoint(tmp_path / "b").config == expected
    assert fields_of(tmp_path / "b" / file / "config.json")[field] == value


def test_a_file_that_predicts_v_stays_one(tiny_refiner_file: Path, tmp_path: Path) -> None:
    config = replace(open_checkpoint(tiny_refiner_file).config, prediction="v")
    metadata = {CONFIG_KEY: config_to_json(config), "modelspec.prediction_type": "v_prediction"}
    save_file(load_file(tiny_refiner_file), tmp_path / "v.safetensors", metadata)
    convert(tmp_path / "v.safetensors", tmp_path / "model", "diffusers")
    assert fields_of(tmp_path / "model" / "scheduler" / "scheduler_config.json")["prediction_type"] == "v_prediction"
    convert(tmp_path / "v.safetensors", tmp_path / "again.safetensors", "official")
    found = open_checkpoint(tmp_path / "again.safetensors")
    assert found.config.prediction == "v"
    assert found.metadata.items() >= metadata.items()


def test_what_a_files_header_says_of_the_prediction_is_brought_up_to_its_configuration(
    tiny_refiner_file: Path, tmp_path: Path
) -> None:
    config = replace(open_checkpoint(tiny_refiner_file).config, prediction="v")
    metadata = {CONFIG_KEY: config_to_json(config), "modelspec.prediction_type": "epsilon"}
    save_file(load_file(tiny_refiner_file), tmp_path / "v.safetensors", metadata)
    prediction = open_checkpoint(tmp_path / "v.safetensors").config.prediction
    convert(tmp_path / "v.safetensors", tmp_path / "again.safetensors", "official")
    found = metadata_of(tmp_path / "again.safetensors")
    assert found["modelspec.prediction_type"] == prediction
    assert config_from_json(found[CONFIG_KEY]).prediction == prediction


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (SCHEDULER, {"timestep_spacing": "trailing"}),
        (SCHEDULER, {"use_karras_sigmas": True}),
        (SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}),
        ("model_index.json", {"force_zeros_for_empty_prompt": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_folders_settings_survive_there_and_back_and_are_told(
    folder: Path, tmp_path: Path, file: str, fields: dict[str, Any]
) -> None:
    """An official file has no place for them: its metadata keep them for the next folder."""
    edit(folder / file, **fields)
    if "_class_name" in fields:
        edit(folder / "model_index.json", scheduler=["diffusers", fields["_class_name"]])
    own = fields_of(folder / file)
    report = str(convert(folder, tmp_path / "a.safetensors", "official"))
    told = ", ".join(f"{name} {value!r}" for name, value in fields.items())
    assert f"an official file has no place for the folder's {told}: kept in its metadata, where" in report
    convert(tmp_path / "a.safetensors", tmp_path / "back", "diffusers")
    convert(folder, tmp_path / "copy", "diffusers")
    for target in (tmp_path / "back", tmp_path / "copy"):
        assert fields_of(target / file).items() >= own.items()
        assert fields_of(target / "model_index.json")["scheduler"][1] == fields_of(target / SCHEDULER)["_class_name"]


def test_a_setting_that_is_absent_is_not_written_as_sdxls(folder: Path, tmp_path: Path) -> None:
    """diffusers' Euler without `timestep_spacing` is "linspace"."""
    own = fields_of(folder / SCHEDULER)
    del own["timestep_spacing"]
    (folder / SCHEDULER).write_text(json.dumps(own))
    report = str(convert(folder, tmp_path / "a.safetensors", "official"))
    assert "no place for the folder's no timestep_spacing: kept" in report
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    assert "timestep_spacing" not in fields_of(tmp_path / "b" / SCHEDULER)


def test_settings_that_are_sdxls_are_not_kept(folder: Path, tmp_path: Path) -> None:
    """As diffusers 0.42 writes them, with every field that the scheduler has."""
    from diffusers import EulerDiscreteScheduler

    EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").save_pretrained(folder / "scheduler")
    assert "final_sigmas_type" in fields_of(folder / SCHEDULER)
    report = str(convert(folder, tmp_path / "a.safetensors", "official"))
    assert "no place for the folder's" not in report
    assert SETTINGS_KEY not in metadata_of(tmp_path / "a.safetensors")


def test_settings_of_an_earlier_folder_do_not_come_back(folder: Path, tmp_path: Path) -> None:
    usual = (folder / SCHEDULER).read_text()
    edit(folder / SCHEDULER, timestep_spacing="trailing")
    convert(folder, tmp_path / "a.safetensors", "official")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    (tmp_path / "b" / SCHEDULER).write_text(usual)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "official")
    assert SETTINGS_KEY not in metadata_of(tmp_path / "c.safetensors")


def test_what_is_no_part_of_sdxls_is_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    edit(
        folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"], image_encoder=[None] * 2
    )
    report = str(convert(folder, tmp_path / "copy", "diffusers"))
    assert "feature_extractor: left out" in report
    found = fields_of(tmp_path / "copy" / "model_index.json")
    assert "feature_extractor" not in found
    assert found["image_encoder"] == [None, None]


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"model_index.json": 3}'])
def test_metadata_that_keep_no_settings(tiny_refiner_file: Path, tmp_path: Path, text: str) -> None:
    metadata = metadata_of(tiny_refiner_file) | {SETTINGS_KEY: text}
    save_file(load_file(tiny_refiner_file), tmp_path / "a.safetensors", metadata)
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "model"), "--to", "diffusers"]) == 2
