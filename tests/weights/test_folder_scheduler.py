"""The settings of a folder's scheduler: the picture is the one that diffusers makes of the folder, or a refusal."""

import inspect
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peers
import pytest
import torch
import transformers
from adapter_files import random_file
from cases import sample
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from sdxl_ref.config import SDXL, InputError
from sdxl_ref.pipelines import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.text.tokenizer import END, START, encode
from sdxl_ref.training.results import write_checkpoint
from sdxl_ref.weights.folder_config import CLASSES, INDEX, NO_EFFECT, SIZES, TEXT, UNET, VAE
from sdxl_ref.weights.folder_scheduler import OF_NO_EFFECT, SCHEDULERS, TRAINING, read_scheduler
from sdxl_ref.weights.report import describe
from weights_convert.adapters import merge
from weights_convert.convert import convert

LEVEL = 1  # of 255: a value that lies between two levels may be rounded either way
OFFICIAL = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
}


@pytest.fixture(scope="session")
def plain(tiny_base_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as our conversion writes it."""
    folder = tmp_path_factory.mktemp("folders") / "plain"
    convert(tiny_base_file, folder, "diffusers")
    return folder


def linked(source: str, target: str) -> None:
    """A copy; of weights, which no test here writes to, another name."""
    if source.endswith(".safetensors") and not Path(target).exists():
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


@pytest.fixture
def edited(plain: Path, tmp_path: Path) -> Any:
    """The folder with another scheduler, and other entries of its index."""

    def edit(scheduler: str = "EulerDiscreteScheduler", index: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(plain, folder, dirs_exist_ok=True, copy_function=linked)
        config = OFFICIAL | settings
        if scheduler in SCHEDULERS and "algorithm_type" not in settings:  # one that diffusers itself can make here
            config = dict(getattr(diffusers, scheduler).from_config(config).config)
            del config["_use_default_values"]  # which diffusers does not write either
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(config | {"_class_name": scheduler}))
        entries = json.loads((folder / "model_index.json").read_text())
        entries |= {"scheduler": ["diffusers", scheduler], **(index or {})}
        (folder / "model_index.json").write_text(json.dumps(entries))
        return folder

    return edit


def picture(pipeline: Any, **arguments: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "np"} | arguments
    pixels = pipeline("a red circle", generator=torch.Generator().manual_seed(0), **call).images[0]
    return np.rint(255 * np.asarray(pixels))


PEER_NETWORKS: dict[str, Any] = {}  # of `plain`, whose weights every edited folder has


def theirs(folder: Path) -> Any:
    """diffusers' pipeline of a folder; its networks are read once."""
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, **PEER_NETWORKS)
    PEER_NETWORKS.update({part: getattr(peer, part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")})
    return peer


def difference(folder: Path, **arguments: Any) -> float:
    """The largest difference of the two pictures of a folder, in levels of 255."""
    own = TextToImagePipeline.from_pretrained(folder)
    return float(np.abs(picture(own, **arguments) - picture(theirs(folder), **arguments)).max())


SETTINGS = [  # each honoured alone: index and scheduler settings
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("EulerDiscreteScheduler", {"steps_offset": 0}),
    ("EulerDiscreteScheduler", {"steps_offset": 7}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"set_alpha_to_one": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
]
REFUSED = [
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "expected interpolation_type 'linear'"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "expected timestep_type 'discrete'"),
    ("EulerDiscreteScheduler", {"sigma_max": 20.0}, "expected sigma_max None"),
    ("DDIMScheduler", {"clip_sample": True}, "expected clip_sample False"),
    ("DDIMScheduler", {"thresholding": True}, "expected thresholding False"),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, "steps between levels that it does not visit"),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, "expected variance_type 'fixed_small'"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "expected solver_order 2"),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "expected solver_type 'midpoint'"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "expected algorithm_type"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type sigma_min is not to be had"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "expected use_lu_lambdas False"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "expected solver_type 'bh2'"),
]
SHOWN = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)  # the others: sweep
TRAINED_OTHERWISE = [
    ({"rescale_betas_zero_snr": True}, "expected rescale_betas_zero_snr False"),
    ({"beta_schedule": "linear"}, "expected beta_schedule 'scaled_linear'"),
    ({"prediction_type": "sample"}, "expected prediction_type epsilon or v_prediction"),
    ({"num_train_timesteps": 500}, "expected num_train_timesteps 1000"),
]


@pytest.mark.parametrize("scheduler", sample([member.name for member in KarrasDiffusionSchedulers], *SHOWN))
def test_every_scheduler_of_diffusers_for_sdxl(scheduler: str, edited: Any) -> None:
    folder = edited(scheduler)
    if scheduler in SCHEDULERS:
        assert difference(folder) <= LEVEL
    else:
        with pytest.raises(InputError, match=f"the scheduler {scheduler} has no sampler here"):
            picture(TextToImagePipeline.from_pretrained(folder))


@pytest.mark.parametrize("case", sample(SETTINGS, *SETTINGS[::3]), ids=str)
def test_settings_are_honoured(case: tuple[str, dict[str, Any]], edited: Any) -> None:
    scheduler, settings = case
    folder = edited(scheduler, **settings)
    assert difference(folder) <= LEVEL


@pytest.mark.parametrize(("scheduler", "settings", "message"), REFUSED, ids=str)
def test_what_is_not_computed_is_refused_by_name(
    scheduler: str, settings: dict[str, Any], message: str, edited: Any
) -> None:
    pipe = TextToImagePipeline.from_pretrained(edited(scheduler, **settings))
    with pytest.raises(InputError, match=message):
        picture(pipe)
    with pytest.raises(InputError, match="name the sampler and the spacing to use in its place"):
        picture(pipe, sampler="euler")
    named = {"sampler": "euler", "spacing": "trailing", "num_inference_steps": 2}
    assert np.isfinite(picture(pipe, **named)).all()


@pytest.mark.parametrize(("settings", "message"), TRAINED_OTHERWISE, ids=str)
def test_another_training_schedule_is_refused(settings: dict[str, Any], message: str, edited: Any) -> None:
    folder = edited()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(InputError, match=message):
        TextToImagePipeline.from_pretrained(folder)


IGNORED = [  # settings without which the picture is another one by more than a level
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"steps_offset": 7}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
]


@pytest.fixture(scope="module")
def plain_picture(plain: Path) -> Any:
    return picture(TextToImagePipeline.from_pretrained(plain))


@pytest.mark.parametrize(("scheduler", "settings"), IGNORED, ids=str)
def test_ignoring_them_would_be_seen(scheduler: str, settings: dict[str, Any], edited: Any, plain_picture: Any) -> None:
    own = picture(TextToImagePipeline.from_pretrained(edited(scheduler, **settings)))
    assert np.abs(own - plain_picture).max() > LEVEL


def test_the_empty_prompt_on_the_negative_side(edited: Any) -> None:
    folder = edited(index={"force_zeros_for_empty_prompt": False})
    own, peer = TextToImagePipeline.from_pretrained(folder), theirs(folder)
    for negative in (None, "blue"):
        pictures = [picture(pipeline, negative_prompt=negative) for pipeline in (own, peer)]
        assert np.abs(pictures[0] - pictures[1]).max() <= LEVEL


def test_null_is_no_for_diffusers(edited: Any) -> None:
    folder = edited(index={"force_zeros_for_empty_prompt": None})
    assert difference(folder) <= LEVEL
    assert TextToImagePipeline.open(folder).defaults.zeros is False


def test_an_explicit_argument_wins(edited: Any, plain: Path) -> None:
    folder = edited("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    pipe = TextToImagePipeline.from_pretrained(folder)
    own = pipe.plan(pipe.request(prompt="", num_inference_steps=6))
    assert "sampler dpmpp_2m" in str(own)
    assert "karras sigmas (DPMSolverMultistepScheduler)" in str(own)
    named = {"sampler": "euler", "spacing": "leading", "karras": False}
    request = pipe.request(prompt="", num_inference_steps=6, **named)
    assert "the model's own" not in str(pipe.plan(request))
    without = pipe.plan(pipe.request(prompt="", num_inference_steps=6, karras=False))
    assert not torch.equal(own.grid.sigmas, without.grid.sigmas)


def test_a_scheduler_cannot_be_set(plain: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(plain)
    with pytest.raises(AttributeError, match="sampler=, spacing=, karras="):
        pipe.scheduler = diffusers.EulerDiscreteScheduler()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_setting_of_a_class_is_in_the_table(name: str) -> None:
    """A new one of diffusers' is noticed; and each has the class's own default where the file leaves it out."""
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in signature.items() if key != "self"}
    scheduler = SCHEDULERS[name]
    table = {**scheduler.honoured, **{key: own for key, (_, own) in (TRAINING | dict(scheduler.needs)).items()}}
    table["prediction_type"] = "epsilon"
    assert set(defaults) <= {*table, *OF_NO_EFFECT}
    for key, default in defaults.items():
        if key in table and not (name == "HeunDiscreteScheduler" and key in ("beta_start", "beta_end")):
            assert (table[key] or None) == (default or None), key


def test_a_setting_that_nobody_knows_is_refused(edited: Any) -> None:
    folder = edited()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_setting": 3, "_name": "x", "unused": None}))
    _, defaults = read_scheduler(folder, "base")
    assert "the setting new_setting 3 is not understood" in defaults.refusal


PARTS = {"UNet2DConditionModel": UNET, "AutoencoderKL": VAE}


@pytest.mark.parametrize("name", PARTS)
def test_every_field_of_a_part_is_in_the_table(name: str) -> None:
    """A new one of diffusers' is noticed; what a file leaves out has the class's own default but for SDXL's marks."""
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    known = {*PARTS[name], *SIZES[name], *NO_EFFECT[name]}
    assert set(signature) - {"self"} == known - {"_class_name"}
    other = {
        key
        for key, value in PARTS[name].items()
        if key in signature and (signature[key].default or None) != (value or None)
    }
    assert other <= {"addition_embed_type", "addition_time_embed_dim", "use_linear_projection"}


def test_every_field_of_a_text_encoder_is_in_the_table() -> None:
    known = {*TEXT, *SIZES["CLIPTextModel"], *NO_EFFECT["CLIPTextModel"]}
    fields = {key for key in transformers.CLIPTextConfig().to_dict() if not key.startswith("_")}
    assert fields <= known


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_every_entry_of_the_index_is_in_the_table(name: str) -> None:
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert set(signature) - {"self"} - {*CLASSES, *INDEX} == {"add_watermarker"}  # which is not written


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DDIMScheduler", {}),
    ],
    ids=str,
)
def test_image_to_image_of_a_refiners_folder(
    scheduler: str, settings: dict[str, Any], tiny_refiner_file: Path, tmp_path: Path
) -> None:
    convert(tiny_refiner_file, tmp_path / "refiner", "diffusers")
    config = dict(getattr(diffusers, scheduler).from_config(OFFICIAL | settings).config)
    del config["_use_default_values"]
    path = tmp_path / "refiner" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config | {"_class_name": scheduler}))
    index = tmp_path / "refiner" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", scheduler]}))
    own = ImageToImagePipeline.from_pretrained(tmp_path / "refiner")
    peer = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "refiner", torch_dtype=torch.float32)
    call = {"image": Image.radial_gradient("L").convert("RGB").resize((64, 64)), "strength": 0.5}
    pictures = []
    for pipeline in (own, peer):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = pipeline("a cup", generator=generator, num_inference_steps=10, output_type="np", **call)
        pictures.append(np.rint(255 * np.asarray(result.images[0])))
    assert np.abs(pictures[0] - pictures[1]).max() <= LEVEL


def test_an_ensemble_tells_of_the_refiners_own_settings(edited: Any, tiny_refiner_file: Path, tmp_path: Path) -> None:
    convert(tiny_refiner_file, tmp_path / "refiner", "diffusers")
    path = tmp_path / "refiner" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "trailing"}))
    pipe = EnsemblePipeline.from_pretrained(edited(), tmp_path / "refiner")
    told = str(pipe.plan(pipe.request(prompt="", num_inference_steps=10)))
    assert told.endswith("; not used: the refiner's own spacing trailing")
    assert "not used" not in str(pipe.plan(pipe.request(prompt="", num_inference_steps=10, spacing="leading")))


SAID_OTHERWISE = [  # of a base's folder: index, file beside, message
    ({"force_zeros_for_empty_prompt": "no"}, {}, "expected force_zeros_for_empty_prompt true or false, found 'no'"),
    ({"_class_name": "FluxPipeline"}, {}, "expected a pipeline of SDXL as StableDiffusionXLPipeline, found 'Flux"),
    ({}, {"tokenizer_2/tokenizer_config.json": {"model_max_length": 40}}, "expected the model_max_length 77, found 40"),
    ({}, {"tokenizer/added_tokens.json": {"<sks>": 49408}}, "expected no tokens beyond CLIP's, found <sks>"),
    ({}, {"tokenizer_2/special_tokens_map.json": {"pad_token": "?"}}, "expected the pad_token '!', found '?'"),
    ({}, {"tokenizer/special_tokens_map.json": {"bos_token": {"content": "!"}}}, "expected the bos_token '<|start"),
    ({}, {"tokenizer/tokenizer_config.json": {"padding_side": "left"}}, "the padding_side 'right', found 'left'"),
    ({}, {"tokenizer/tokenizer_config.json": {"additional_special_tokens": ["red"]}}, "beyond CLIP's, found red"),
    ({}, {"tokenizer/tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "red"}}}}, "found red"),
    ({}, {"tokenizer/tokenizer.json": {"model": {"vocab": {"!": 1}, "merges": []}}}, "as '!' 1"),
    ({}, {"tokenizer/tokenizer_config.json": {"truncation_side": "left"}}, "the truncation_side 'right', found 'left'"),
    ({}, {"tokenizer/tokenizer.json": {"truncation": {"direction": "Left"}}}, "to be cut at their right end"),
    ({}, {"unet/config.json": "<html></html>"}, "unet.config.json is a page of HTML.*: expected JSON"),
    ({}, {"tokenizer/tokenizer.json": {"model": []}}, "expected a tokenizer as transformers writes it"),
    ({"scheduler": "DDIMScheduler"}, {}, "expected the scheduler's library and class, found 'DDIMScheduler'"),
    ({}, {"scheduler/scheduler_config.json": {"trained_betas": []}}, r"expected trained_betas None, found \[\]"),
    ({}, {"scheduler/scheduler_config.json": {"_use_default_values": ["timestep_spacing"]}}, "is not done here"),
    ({}, {"vae/config.json": {"_use_default_values": ["scaling_factor"]}}, "remove the fields that it names"),
    ({}, {"unet/config.json": ""}, "unet.config.json is empty"),
    ({}, {"unet/config.json": "version https://git-lfs.github.com/spec/v1"}, "is a pointer of git-lfs"),
    ({}, {"unet/config.json": "[" * 100_000}, "unet.config.json is no JSON: .*download it again"),
    ({}, {"tokenizer/vocab.json": {"!": 1}}, "expected CLIP's vocabulary, found 1 tokens with other ids, as '!' 1"),
    ({}, {"tokenizer/merges.txt": "#version: 0.2"}, "expected CLIP's 48894 pairs, found 'none' as number 1"),
    ({}, {"unet/config.json": {"block_out_channels": []}}, r"unet.config.json is not SDXL's: expected block_out_ch"),
    ({}, {"unet/config.json": {"sample_size": float("inf")}}, "sample_size to be a whole number above 0, found inf"),
    ({}, {"unet/config.json": {"attention_head_dim": [5, 0]}}, "attention_head_dim to be a whole number above 0"),
    ({}, {"vae/config.json": {"scaling_factor": -1.0}}, "expected scaling_factor to be a finite number above 0"),
    ({}, {"vae/config.json": {"scaling_factor": None}}, "expected scaling_factor to be a finite number above 0"),
    ({}, {"text_encoder/config.json": {"hidden_act": "relu"}}, "expected hidden_act gelu or quick_gelu, found 'relu'"),
    ({}, {"text_encoder/config.json": {"hidden_act": ["gelu"]}}, "expected hidden_act to be a name"),
    ({}, {"scheduler/scheduler_config.json": {"prediction_type": []}}, r"expected prediction_type .* found \[\]"),
]


@pytest.mark.parametrize(("index", "files", "message"), SAID_OTHERWISE, ids=str)
def test_what_else_a_folder_says(index: dict[str, Any], files: dict[str, Any], message: str, edited: Any) -> None:
    tokenizers = {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    folder = edited(index=tokenizers | index)
    for name, fields in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.is_file() and isinstance(fields, dict):
            fields = json.loads(path.read_text()) | fields
        path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    with pytest.raises(InputError, match=message):
        TextToImagePipeline.from_pretrained(folder)


def test_the_vocabulary_of_a_folder(edited: Any) -> None:
    """The one that is built in, in the files of transformers' `CLIPTokenizer`, or a refusal."""
    folder = edited(index={name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")})
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert theirs("a red barn").input_ids == [START, *encode("a red barn"), END]
    TextToImagePipeline.open(folder)
    pairs = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text(pairs.replace("\nt h\n", "\nh t\n"), encoding="utf-8")
    with pytest.raises(InputError, match="expected CLIP's 48894 pairs, found 'h t' as number 2"):
        TextToImagePipeline.open(folder)


REFUSED_WORDS = [
    ("EulerDiscreteScheduler", {"steps_offset": 1.5}, "expected steps_offset a whole number from 0 to 999, found 1.5"),
    ("EulerDiscreteScheduler", {"timestep_spacing": []}, r"expected timestep_spacing .* found \[\]"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": []}, r"expected algorithm_type .* found \[\]"),
]


@pytest.mark.parametrize(("scheduler", "settings", "message"), REFUSED_WORDS, ids=str)
def test_what_no_scheduler_understands(scheduler: str, settings: dict[str, Any], message: str, edited: Any) -> None:
    folder = edited(scheduler)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert re.search(message, read_scheduler(folder, "base")[1].refusal)


def test_a_folder_whose_scheduler_nobody_names(edited: Any) -> None:
    folder = edited(index={"scheduler": None})
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(OFFICIAL))
    assert "no class of a scheduler is named" in read_scheduler(folder, "base")[1].refusal


def test_a_converted_file_is_run_as_its_folder(edited: Any, tmp_path: Path) -> None:
    """Its metadata keep what the folder says; that the scheduler is DDIM's stands in the index alone."""
    folder = edited("DDIMScheduler", {"force_zeros_for_empty_prompt": False}, set_alpha_to_one=False)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}))
    report = str(convert(folder, tmp_path / "file.safetensors", "official"))
    assert "_class_name 'DDIMScheduler'" in report
    own = TextToImagePipeline.from_pretrained(tmp_path / "file.safetensors")
    told = str(own.plan(own.request(prompt="", num_inference_steps=6)))
    assert "the model's own: sampler ddim" in told
    assert "zeros False" in told
    assert float(np.abs(picture(own) - picture(theirs(folder))).max()) <= LEVEL
    assert "sampler ddim" in describe(tmp_path / "file.safetensors").details["its own settings"]


def test_what_is_made_of_a_folder_is_run_as_the_folder(edited: Any, tmp_path: Path) -> None:
    """A merge, and a fine-tuned checkpoint."""
    folder = edited(timestep_spacing="trailing", index={"force_zeros_for_empty_prompt": False})
    adapter = random_file(peers.TINY_BASE, tmp_path / "a.safetensors")
    merge(folder, [(adapter, 0.0)], tmp_path / "merged.safetensors")
    source = TextToImagePipeline.open(folder)
    tuned = write_checkpoint(tmp_path, source, source.load("unet"), {})
    for file in (tmp_path / "merged.safetensors", tuned):
        assert TextToImagePipeline.open(file).defaults == source.defaults != SDXL


def test_a_spacing_that_is_named_keeps_the_folders_offset(edited: Any) -> None:
    """As diffusers does, where the spacing is changed by `from_config`."""
    folder = edited(timestep_spacing="linspace", steps_offset=0)
    own = TextToImagePipeline.from_pretrained(folder)
    peer = theirs(folder)
    peer.scheduler = type(peer.scheduler).from_config(peer.scheduler.config, timestep_spacing="leading")
    assert float(np.abs(picture(own, spacing="leading") - picture(peer)).max()) <= LEVEL


def test_a_text_is_not_true(edited: Any) -> None:
    folder = edited()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": "false"}))
    assert "expected use_karras_sigmas true or false, found 'false'" in read_scheduler(folder, "base")[1].refusal


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_a_link_to_nowhere_is_no_missing_file(name: str, edited: Any) -> None:
    folder = edited(
        prediction_type="v_prediction", index={name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer",)}
    )
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/nowhere/x.json")
    with pytest.raises(InputError, match=f"could not read .*{name}"):
        TextToImagePipeline.open(folder)


def test_a_link_in_place_of_a_folder(edited: Any) -> None:
    folder = edited(index={"tokenizer": ["transformers", "CLIPTokenizer"]})
    for name in ("tokenizer", "scheduler"):
        shutil.rmtree(folder / name)
        (folder / name).symlink_to("/nowhere")
        with pytest.raises(InputError, match=f"expected a JSON file .*{name}.*there is no such file"):
            TextToImagePipeline.open(folder)
        (folder / name).unlink()
    assert TextToImagePipeline.open(folder).config.kind == "base"  # SDXL's own tokenizer is built in


def test_a_class_without_its_settings_stays_refused_in_a_file(edited: Any, tmp_path: Path) -> None:
    folder = edited("DDIMScheduler")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    convert(folder, tmp_path / "a.safetensors", "official")
    assert (
        "is missing, the settings of DDIMScheduler"
        in TextToImagePipeline.open(tmp_path / "a.safetensors").defaults.refusal
    )


def test_the_class_may_stand_in_the_settings_alone(edited: Any, tmp_path: Path) -> None:
    folder = edited("DDIMScheduler", {"scheduler": [None, None]}, set_alpha_to_one=False)
    convert(folder, tmp_path / "a.safetensors", "official")
    for place in (folder, tmp_path / "a.safetensors"):
        assert TextToImagePipeline.open(place).defaults.sampler == "ddim"


def test_a_folder_without_its_index(edited: Any) -> None:
    folder = edited()
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"lacks model_index.json, which says what its parts are"):
        TextToImagePipeline.open(folder)


def test_a_scheduler_without_its_settings_is_refused(edited: Any) -> None:
    folder = edited("DDIMScheduler")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "is missing, the settings of DDIMScheduler" in read_scheduler(folder, "base")[1].refusal


def test_ddim_does_not_step_to_levels_that_it_does_not_visit(edited: Any) -> None:
    folder = edited("DDIMScheduler", timestep_spacing="trailing")
    assert difference(folder, num_inference_steps=10) <= LEVEL
    pipe = TextToImagePipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="use a number that divides 1000, or another spacing"):
        pipe.plan(pipe.request(prompt="", num_inference_steps=6))


def test_what_a_refusal_leaves_is_kept(edited: Any) -> None:
    """Karras' sigmas of a folder whose sampler is not to be had here."""
    pipe = TextToImagePipeline.from_pretrained(
        edited("DPMSolverMultistepScheduler", solver_order=3, use_karras_sigmas=True)
    )
    plan = pipe.plan(pipe.request(prompt="", num_inference_steps=6, sampler="dpmpp_3m_sde", spacing="linspace"))
    assert "the model's own: karras True" in str(plan)


def test_zeros_are_told_where_they_are_read(edited: Any) -> None:
    pipe = TextToImagePipeline.from_pretrained(edited(index={"force_zeros_for_empty_prompt": False}))
    assert "zeros False" in str(pipe.plan(pipe.request(prompt="", num_inference_steps=6)))
    assert "zeros" not in str(pipe.plan(pipe.request(prompt="", num_inference_steps=6, negative_prompt="blue")))


def test_v_of_a_folder_is_told(edited: Any) -> None:
    checkpoint = TextToImagePipeline.open(edited(prediction_type="v_prediction"))
    assert checkpoint.config.prediction == "v"
    assert "the UNet returns v, by the scheduler's settings" in checkpoint.note
