"""Models that predict v against diffusers with `prediction_type="v_prediction"`, live on the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import checks
import pairs
import peers
import pytest
import torch
from pairs import seeded
from safetensors import safe_open

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.stated_config import config_from_json, config_to_json

CONFIGS = {kind: replace(pairs.CONFIGS[kind], prediction="v") for kind in ("refiner", "base")}
PIPELINES: dict[str, Any] = {"refiner": ImageToImagePipeline, "base": TextToImagePipeline}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
}


def pipeline(kind: str) -> Any:
    return PIPELINES[kind](CONFIGS[kind], **pairs.networks(kind))


def call(kind: str, **changes: Any) -> dict[str, Any]:
    arguments = pairs.request() if kind == "refiner" else pairs.text_request(negative_prompt="blurry")
    return arguments | {"generator": seeded(7)} | changes


def peer(kind: str, scheduler: str = "EulerDiscreteScheduler", **options: Any) -> Any:
    build = pairs.diffusers_refiner if kind == "refiner" else pairs.diffusers_base
    return build(scheduler, **options, prediction_type="v_prediction")


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_runs_are_those_of_diffusers(kind: str, sampler: str) -> None:
    name, options = SCHEDULERS[sampler]
    theirs = peer(kind, name, **options)(**call(kind)).images
    ours = pipeline(kind)(**call(kind), sampler=sampler).images
    checks.close(ours, theirs, checks.PIPELINE, f"v, {kind}, {sampler}")


@pytest.mark.parametrize("kind", PIPELINES)
def test_they_are_other_runs_than_those_of_noise(kind: str) -> None:
    noise = PIPELINES[kind](pairs.CONFIGS[kind], **pairs.networks(kind))
    assert peers.distance(pipeline(kind)(**call(kind)).images, noise(**call(kind)).images) > 0.1


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 9.0, "guidance_rescale": 0.7}])
def test_guidance_and_its_rescaling(kind: str, guidance: dict[str, float]) -> None:
    theirs = peer(kind)(**call(kind, **guidance)).images
    ours = pipeline(kind)(**call(kind, **guidance)).images
    checks.close(ours, theirs, checks.PIPELINE, f"v, {kind}, {guidance}")


# --- where the prediction is said ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A refiner of v, by its metadata."""
    path = tmp_path / "v.safetensors"
    save_checkpoint(path, CONFIGS["refiner"], pairs.networks("refiner"), torch.float32)
    return path


def test_a_file_carries_it(file: Path) -> None:
    assert open_checkpoint(file).config == CONFIGS["refiner"]
    pipe = ImageToImagePipeline.from_pretrained(file)
    assert pipe.config.prediction == "v"
    assert torch.equal(pipe(**call("refiner")).images, pipeline("refiner")(**call("refiner")).images)


def test_an_argument_says_it_where_the_file_does_not(tiny_refiner_file: Path, tiny_base_file: Path) -> None:
    with safe_open(tiny_refiner_file, framework="pt") as opened:
        assert "prediction" not in opened.metadata()[CONFIG_KEY]  # what is as usual is left out
    assert ImageToImagePipeline.from_pretrained(tiny_refiner_file).config.prediction == "epsilon"
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, prediction="v")
    assert pipe.config == replace(pairs.REFINER, prediction="v")
    ensemble = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, prediction="v")
    assert ensemble.base.config.prediction == ensemble.refiner.config.prediction == "v"


def test_an_argument_outweighs_the_file(file: Path) -> None:
    assert ImageToImagePipeline.from_pretrained(file, prediction="epsilon").config == pairs.REFINER


@pytest.mark.parametrize("kind", CONFIGS)
def test_json_there_and_back(kind: str) -> None:
    assert config_from_json(config_to_json(CONFIGS[kind])) == CONFIGS[kind]
    assert config_from_json(config_to_json(pairs.CONFIGS[kind])).prediction == "epsilon"


def test_an_unknown_prediction_is_answered_with_the_nearest(tiny_refiner_file: Path) -> None:
    with pytest.raises(InputError, match="unknown prediction 'epsilom': did you mean 'epsilon'"):
        ImageToImagePipeline.from_pretrained(tiny_refiner_file, prediction="epsilom")
