"""What is opened as a checkpoint and what is refused: names, folders, pickles, keys that do not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, LABEL, LOGIT_SCALE, NORM, error_of, kinds, metadata, same, write
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref.weights.identity import vae_name
from sdxl_ref.weights.names import EXAMPLE
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from sdxl_ref.weights.report import describe
from sdxl_ref.weights.tensor_files import PICKLES
from weights_convert.convert import convert

Change = Callable[[dict[str, Tensor]], None]

# --- extras -------------------------------------------------------------------------------------------------------

EXTRAS = {
    "denoiser.sigmas": torch.ones(1000),
    "conditioner.embedders.0.model.attn_mask": torch.zeros(77, 77),
    "conditioner.embedders.1.model.attn_mask": torch.zeros(77, 77),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
}
STRAYS = {  # of training code, of merging tools and of ComfyUI, as they are called in published files
    **{
        name: torch.ones(1000)
        for name in (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "lvlb_weights",
            "logvar",
        )
    },
    "first_stage_model.loss.logvar": torch.zeros(()),
    "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4),
    "first_stage_model.loss.perceptual_loss.scaling_layer.shift": torch.zeros(1, 3, 1, 1),
    "first_stage_model.model_ema.decay": torch.tensor(0.9999),
    "first_stage_model.model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    "conditioner.embedders.0.transformer.embeddings.position_ids": torch.arange(77)[None],
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "conditioner.embedders.1.model.text_model.embeddings.position_ids": torch.arange(77)[None],
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(128, 128),
    "conditioner.embedders.0.text_projection": torch.zeros(128, 128),
    "conditioner.embedders.0.text_projection.weight": torch.zeros(128, 128),
    "conditioner.embedders.0.logit_scale": torch.tensor(4.6),
    "conditioner.embedders.0.transformer.logit_scale": torch.tensor(4.6),
    "conditioner.embedders.0.model.logit_scale": torch.tensor(4.6),  # of a base, whose bigG is the other one
    "logit_scale": torch.tensor(4.6),
}


@pytest.mark.parametrize("with_config", [True, False])
def test_stray_tensors_are_extras(with_config: bool, files: dict[str, Path], tmp_path: Path) -> None:
    """They change nothing, and `info` lists each of them."""
    texts = metadata(CONFIGS["base"]) if with_config else None
    state = load_file(files["base"])
    path = write(tmp_path / "a.safetensors", state | STRAYS, texts)
    found = open_checkpoint(path)
    assert same(found.config, CONFIGS["base"])
    described = describe(path)
    assert sorted(described.extras) == sorted(STRAYS)
    assert "conditioner.embedders.0.text_projection" in "\n".join(described.lines())
    assert vae_name(found, "") == vae_name(open_checkpoint(files["base"]), "")


def test_strays_survive_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files["base"]) | STRAYS
    write(tmp_path / "a.safetensors", state, metadata(CONFIGS["base"]))
    for source, target, to in (("a.safetensors", "folder", "diffusers"), ("folder", "b.safetensors", "official")):
        convert(tmp_path / source, tmp_path / target, to)
    back = load_file(tmp_path / "b.safetensors")
    assert {key for key in STRAYS if not torch.equal(back[key], STRAYS[key])} == set()


def test_a_refiners_projection_is_no_stray(state: dict[str, Tensor], tmp_path: Path) -> None:
    key = "conditioner.embedders.0.model.text_projection"
    del state[key]
    assert f"1 missing: {key}" in error_of(write(tmp_path / "a.safetensors", state, metadata()))


@kinds
@pytest.mark.parametrize("with_config", [True, False])
def test_what_official_files_also_carry(kind: str, with_config: bool, files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files[kind])
    extras = {key: value for key, value in EXTRAS.items() if kind == "base" or is_refiners(key)}
    texts = metadata(CONFIGS[kind]) if with_config else None
    found = open_checkpoint(write(tmp_path / "a.safetensors", state | extras, texts))
    assert same(found.config, CONFIGS[kind])
    unet = found.load("unet").state_dict()
    assert all(torch.equal(tensor, state["model.diffusion_model." + key]) for key, tensor in unet.items())


def is_refiners(key: str) -> bool:
    """Whether a refiner's file may carry it: one text encoder, OpenCLIP."""
    return "embedders.1" not in key and "transformer" not in key


@pytest.mark.parametrize(
    "key", ["denoiser.sigma", "model_emas.x", "xdenoiser.sigmas", "optimizer.step", "model.attn_mask"]
)
def test_no_other_extra(key: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state | {key: torch.zeros(1)}, metadata())
    assert f"1 unexpected: {key}" in error_of(path)


# --- keys that do not fit -----------------------------------------------------------------------------------------


def without(prefix: str) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return change


def changed(key: str, value: Tensor) -> Change:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without(NORM), f"1 missing: {NORM}"),
        (changed(NORM, torch.ones(33)), f"1 of another shape: {NORM} (expected 32, found 33)"),
        (changed(NORM, torch.ones(32, 1)), f"1 of another shape: {NORM} (expected 32, found 32x1)"),
        (changed(NORM, torch.tensor(1.0)), f"1 of another shape: {NORM} (expected 32, found scalar)"),
        (
            changed(LOGIT_SCALE["refiner"], torch.ones(1)),
            "1 of another shape: conditioner.embedders.0.model.logit_scale",
        ),
        (changed("first_stage_model.losses.x", torch.ones(1)), "1 unexpected: first_stage_model.losses.x"),
        (changed("scale_factor", torch.tensor(0.18)), "1 unexpected: scale_factor"),  # it would scale the latents
        (without("conditioner.embedders.0.model.ln_final"), "2 missing: conditioner.embedders.0.model.ln_final."),
        (without("first_stage_model.decoder."), "missing: first_stage_model.decoder."),
    ],
)
def test_keys_that_do_not_fit(change: Change, problem: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change(state)
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert f"{tmp_path}/a.safetensors looks like an SDXL refiner, but its tensors do not fit: " in line
    assert problem in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_of_whole_numbers_are_refused(dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    state |= {NORM: state[NORM].to(dtype), "model_ema.num_updates": torch.tensor(7)}  # the latter is no weight
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert line == f"{tmp_path}/a.safetensors: expected weights in floating point, found 1 others, as {NORM}"


def test_several_problems_in_one_line_with_their_counts(state: dict[str, Tensor], tmp_path: Path) -> None:
    without("first_stage_model.decoder.mid.")(state)
    state |= {"lora.a": torch.ones(1), NORM: torch.ones(2)}
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert "missing: first_stage_model.decoder.mid." in line
    assert "1 unexpected: lora.a" in line
    assert f"1 of another shape: {NORM} (expected 32, found 2)" in line
    assert "\n" not in line
    assert len(line) < 1500  # of many keys, the first few


# --- names --------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told_what_there_could_be(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    expected = f"expected a file, a folder, pocket or a repository as {EXAMPLE}"
    assert error_of(path) == f"no such checkpoint: {path}: {expected}"


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_pocket_is_the_model_that_is_asked_for(kind: str) -> None:
    name = f"pocket-{kind}"
    assert open_checkpoint("pocket", kind).path == open_checkpoint(name).path == POCKET[name]
    assert open_checkpoint(name, "base").config.kind == kind  # the whole name says it itself


def test_what_is_open_is_returned_as_it_is(files: dict[str, Path]) -> None:
    found = open_checkpoint(files["refiner"])
    assert open_checkpoint(found) is found


# --- pickles and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*PICKLES, ".CKPT"])
def test_a_pickle_is_refused_by_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"no pickle")
    line = error_of(path)
    assert line.startswith(f"{path} is a pickle, which can run any code when opened: expected a safetensors file")


def test_a_pickle_is_not_opened_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"no pickle")
    opened: list[str] = []
    watch = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watch and event == "open" else None)
    error_of(path)
    watch.clear()  # a hook stays for good
    assert str(path) not in opened


def test_a_pickle_under_another_name_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"state_dict": {LABEL: torch.zeros(1)}}, path)
    assert f"{path} is a pickle, which can run any code when opened" in error_of(path)


def test_a_folder_with_one_file_is_that_file(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(files["refiner"].read_bytes())
    (tmp_path / "README.md").write_text("hello")
    assert open_checkpoint(tmp_path).path == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "none"),
        (["model.bin", "README.md"], "none"),
        (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"),
    ],
)
def test_a_folder_without_one_file(names: list[str], found: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    line = error_of(tmp_path)
    assert line == f"expected one .safetensors file in the folder {tmp_path}, found {found}: name the file"


def test_a_cache_of_the_hub_is_told_from_a_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    line = error_of(tmp_path / "models--owner--name")
    assert line.endswith(f"is the hub's cache of owner/name: expected a model, name a snapshot as {snapshot}")
    assert error_of(tmp_path).endswith(
        "is the hub's cache: expected a model, found those of owner/name: name one of them"
    )
