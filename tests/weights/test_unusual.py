"""Files of other tools: a prefix before all names, attention as matrices, markers, predictions, no VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peers
import pytest
import torch
from checkpoints import CONFIGS, LABEL, NORM, REFINER, error_of, metadata, same, write
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import CONFIG_KEY, Checkpoint
from sdxl_ref.weights.identity import vae_name
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.report import describe
from sdxl_ref.weights.stated_config import config_to_json
from weights_convert.cli import main as convert_main
from weights_convert.convert import convert
from weights_convert.reports import verify

State = dict[str, Tensor]
ATTENTION = tuple(f"mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out"))


def same_networks(found: Checkpoint, state: State, prefix: str = "") -> None:
    """That what is loaded is what is stored, bit for bit."""
    for part, official in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        for key, tensor in found.load(part).state_dict().items():
            stored = state[prefix + official + key]
            assert torch.equal(tensor, stored.reshape(tensor.shape)), key


# --- a prefix before everything -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "with_config"),
    [("model.", True), ("model.", False), ("state_dict.", True), ("module.", True), ("state_dict.model.", False)],
)
def test_a_prefix_before_all_names(prefix: str, with_config: bool, state: State, tmp_path: Path) -> None:
    state = {prefix + key: tensor for key, tensor in state.items()}
    texts = metadata() if with_config else None
    found = open_checkpoint(write(tmp_path / "a.safetensors", state | {f"{prefix}betas": torch.ones(3)}, texts))
    assert same(found.config, REFINER)
    same_networks(found, state, prefix)
    assert describe(found.path).extras == ("betas",)
    assert all(verdict.holds for verdict in verify(found.path))


def test_a_file_with_a_prefix_is_converted_to_official_names(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"model.{key}": tensor for key, tensor in state.items()}, metadata())
    convert(path, tmp_path / "b.safetensors", "official")
    back = load_file(tmp_path / "b.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_hash_of_a_file_with_a_prefix_is_the_files(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"model.{key}": tensor for key, tensor in state.items()}, metadata())
    plain = open_checkpoint(write(tmp_path / "b.safetensors", state, metadata()))
    found = open_checkpoint(path)
    assert found.sha256() != plain.sha256()
    assert vae_name(found, "") == vae_name(plain, "")


def test_a_prefix_before_some_names_only(state: State, tmp_path: Path) -> None:
    state = {f"model.{key}" if key != NORM else key: tensor for key, tensor in state.items()}
    assert open_checkpoint(write(tmp_path / "a.safetensors", state, metadata())).config == REFINER
    state[f"model.{NORM}"] = state[NORM] + 1
    assert "holds tensors twice, with and without model." in error_of(write(tmp_path / "a.safetensors", state))


def test_an_unknown_tensor_under_a_prefix_is_still_refused(state: State, tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in state.items()} | {"module.other": torch.ones(1)}
    assert "1 unexpected: other" in error_of(write(tmp_path / "a.safetensors", state, metadata()))


# --- the VAE's attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "with_config"), [("refiner", True), ("base", False)])
def test_the_vaes_attention_as_matrices(kind: str, with_config: bool, files: dict[str, Path], tmp_path: Path) -> None:
    """The same weights to the bit; diffusers' converter takes both forms too, and its decoder agrees."""
    state = load_file(files[kind])
    matrices = {key: t[:, :, 0, 0].contiguous() if key.endswith(ATTENTION) else t for key, t in state.items()}
    assert sum(matrices[key].shape != state[key].shape for key in state) == 8
    path = write(tmp_path / "a.safetensors", matrices, metadata(CONFIGS[kind]) if with_config else None)
    found = open_checkpoint(path)
    same_networks(found, matrices)
    assert vae_name(found, "") == vae_name(open_checkpoint(files[kind]), "")
    peer = peers.vae2d(CONFIGS[kind].vae)
    peers.load(peer, convert_ldm_vae_checkpoint(matrices, peer.config))
    z = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    ours: Any = found.load("vae")
    assert peers.distance(ours.decode(z), peer.decode(z).sample) < 5e-6


@pytest.mark.parametrize("shape", [(64,), (64, 64, 1), (64, 64, 3, 3), (64, 32)])
def test_attention_of_another_shape_is_refused(shape: tuple[int, ...], state: State, tmp_path: Path) -> None:
    state[f"first_stage_model.decoder.{ATTENTION[0]}"] = torch.zeros(shape)
    assert "1 of another shape" in error_of(write(tmp_path / "a.safetensors", state, metadata()))


def test_matrices_are_written_as_kernels(state: State, tmp_path: Path) -> None:
    """Into a file and through a folder."""
    matrices = {key: t[:, :, 0, 0].contiguous() if key.endswith(ATTENTION) else t for key, t in state.items()}
    source = write(tmp_path / "a.safetensors", matrices, metadata())
    convert(source, tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "official")
    convert(source, tmp_path / "c.safetensors", "official")
    for name in ("b.safetensors", "c.safetensors"):
        back = load_file(tmp_path / name)
        assert all(torch.equal(back[key], state[key]) for key in state)


# --- what the UNet returns ----------------------------------------------------------------------------------------

V_FILES: dict[str, tuple[dict[str, str], State, str]] = {
    "by the header": ({"modelspec.prediction_type": "v"}, {}, "modelspec.prediction_type in the metadata"),
    "by another spelling": ({"modelspec.prediction_type": "V_Prediction"}, {}, "modelspec.prediction_type"),
    "by ComfyUI's header": ({"modelspec.predict_key": "v"}, {}, "modelspec.predict_key in the metadata"),
    "by the marker": ({}, {"v_pred": torch.tensor([])}, "the marker v_pred"),
    "by the marker against the header": (
        {"modelspec.prediction_type": "epsilon"},
        {"v_pred": torch.tensor([])},
        "the marker v_pred",
    ),
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", V_FILES)
def test_a_model_that_predicts_v_runs_as_one(name: str, with_config: bool, state: State, tmp_path: Path) -> None:
    texts, markers, by = V_FILES[name]
    texts = texts | (metadata() if with_config else {})
    found = open_checkpoint(write(tmp_path / "a.safetensors", state | markers, texts))
    assert found.config.prediction == "v"
    assert f"the UNet returns v, by {by}" in found.note
    assert set(describe(found.path).extras) == set(markers)


@pytest.mark.parametrize("word", ["epsilon", "eps", "Epsilon", ""])
def test_a_header_that_says_epsilon(word: str, state: State, tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "a.safetensors", state, metadata() | {"modelspec.prediction_type": word}))
    assert found.config == REFINER
    assert found.note == ""


def test_a_configuration_that_says_v_stays_so(state: State, tmp_path: Path) -> None:
    """Also where a header was copied along that says "epsilon"."""
    texts = {CONFIG_KEY: config_to_json(REFINER)[:-1] + ', "prediction": "v"}', "modelspec.prediction_type": "epsilon"}
    found = open_checkpoint(write(tmp_path / "a.safetensors", state, texts))
    assert found.config.prediction == "v"
    assert f"the UNet returns v, by {CONFIG_KEY} in the metadata, although" in found.note


@pytest.mark.parametrize("word", ["sample", "flow", "x0"])
def test_another_prediction_is_refused_by_its_name(word: str, state: State, tmp_path: Path) -> None:
    line = error_of(write(tmp_path / "a.safetensors", state, metadata() | {"modelspec.prediction_type": word}))
    assert f"predicts '{word}' by its modelspec.prediction_type: expected epsilon or v" in line


@pytest.mark.parametrize("marker", ["ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"])
def test_noise_levels_that_we_do_not_have_are_refused_by_their_marker(
    marker: str, state: State, tmp_path: Path
) -> None:
    state |= {"v_pred": torch.tensor([]), marker: torch.tensor([120.0])}
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert f"has the marker {marker}: " in line
    assert ("zero terminal SNR" if marker == "ztsnr" else "EDM") in line


def test_the_marker_makes_the_picture_that_diffusers_makes_of_a_v_prediction(tmp_path: Path) -> None:
    """Three steps of our Euler on a marked file against diffusers' with `prediction_type="v_prediction"`."""
    config = peers.TINY_REFINER
    networks = peers.networks(config)
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder_2": "conditioner.embedders.0.model.",
    }
    state = {prefixes[part] + key: t for part, network in networks.items() for key, t in network.state_dict().items()}
    path = write(tmp_path / "a.safetensors", state | {"v_pred": torch.tensor([])}, {CONFIG_KEY: config_to_json(config)})
    pipe = ImageToImagePipeline.from_pretrained(path)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    options = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 4}
    ours = pipe("a cup", latents=latents, denoising_start=0.4, **options).images
    text = pipe.encode_prompt("a cup", do_classifier_free_guidance=False)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(4)
    numbers = torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]])
    unet = peers.diffusers_unet(networks["unet"])
    x = latents
    scheduler.set_begin_index(1)
    for t in scheduler.timesteps[1:]:
        scaled = scheduler.scale_model_input(x, t)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": numbers}
        v = unet(scaled, t, encoder_hidden_states=text.prompt_embeds, added_cond_kwargs=added).sample
        x = scheduler.step(v, t, x).prev_sample
    assert peers.distance(ours, x) < 1e-5
    as_epsilon = ImageToImagePipeline.from_pretrained(path, prediction="epsilon")
    assert peers.distance(as_epsilon("a cup", latents=latents, denoising_start=0.4, **options).images, x) > 0.01


def test_conversion_keeps_the_prediction(state: State, tmp_path: Path) -> None:
    """Of a header and of a marker, into a file and into a folder."""
    for name in ("by the header", "by the marker"):
        texts, markers, _ = V_FILES[name]
        source = write(tmp_path / "a.safetensors", state | markers, metadata() | texts)
        convert(source, tmp_path / name, "diffusers")
        scheduler = read_json(tmp_path / name / "scheduler" / "scheduler_config.json")
        assert scheduler["prediction_type"] == "v_prediction"
        convert(source, tmp_path / f"{name}.safetensors", "official")
        assert open_checkpoint(tmp_path / f"{name}.safetensors").config.prediction == "v"


# --- whole numbers, no VAE ----------------------------------------------------------------------------------------


def test_whole_numbers_in_an_unusual_file_are_refused(state: State, tmp_path: Path) -> None:
    state = {f"model.{key}": t for key, t in state.items()} | {f"model.{NORM}": torch.ones(32, dtype=torch.int8)}
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert line.endswith(f"expected weights in floating point, found 1 others, as {NORM}")


@pytest.mark.parametrize("with_config", [True, False])
def test_a_file_without_a_vae_is_told_the_remedy(
    with_config: bool, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: tensor for key, tensor in state.items() if not key.startswith("first_stage_model.")}
    path = write(tmp_path / "a.safetensors", state, metadata() if with_config else None)
    assert error_of(path) == f"{path} holds no VAE: give one as --vae FILE, or vae= in Python"
    for run, words in ((main, ["info", path]), (convert_main, ["verify", path])):
        assert run([str(word) for word in words]) == 2
        assert "holds no VAE" in capsys.readouterr().err


def test_a_file_without_a_vae_shares_one_that_is_there(state: State, files: dict[str, Path], tmp_path: Path) -> None:
    whole = ImageToImagePipeline.from_pretrained(files["refiner"])
    state = {key: tensor for key, tensor in state.items() if not key.startswith("first_stage_model.")}
    pipe = ImageToImagePipeline.from_pretrained(write(tmp_path / "a.safetensors", state, metadata()), vae=whole.vae)
    assert pipe.vae is whole.vae


def test_a_file_with_half_a_vae_is_not_one_without(state: State, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in state.items() if not key.startswith("first_stage_model.decoder.")}
    assert "missing: first_stage_model.decoder." in error_of(write(tmp_path / "a.safetensors", state, metadata()))


def test_a_text_encoder_less_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    state = {key: t for key, t in load_file(files["base"]).items() if not key.startswith("conditioner.")}
    assert LABEL in state
    line = error_of(write(tmp_path / "a.safetensors", state, metadata(CONFIGS["base"])))
    assert "is a UNet without text encoders, no SDXL base or refiner" in line
    with pytest.raises(InputError, match="text encoder"):
        TextToImagePipeline.from_pretrained(tmp_path / "a.safetensors")
