"""PIL pictures of a call carry in `info` what the pipeline knows of how they were made, in the command line's form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import pytest
import readers
import torch
from pairs import seeded, seeds
from PIL import Image
from safetensors.torch import save_file

import sdxl_ref
from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline, load_image
from sdxl_ref.pictures.settings import png_chunks

SHORT: dict[str, Any] = {"prompt": "a cup", "height": 64, "width": 72, "num_inference_steps": 4}


def recorded(picture: Image.Image) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(picture.info["sdxl_ref"])
    return found


def test_what_a_picture_carries(tiny_base_file: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    call = SHORT | {"negative_prompt": "blurry", "sampler": "dpmpp_2m", "karras": True, "guidance_scale": 3.0}
    [picture] = pipe(**call, original_size=(512, 640), generator=seeded(7)).images
    made = recorded(picture)
    expected = {
        **call,
        "seed": 7,
        "size": "72x64",
        "original_size": [512, 640],
        "eta": None,
        "dtype": "float32",
        "device": "cpu",
        "prediction": "epsilon",
        "watermark": False,
        "adapters": {},
        "checkpoint": {"file": tiny_base_file.name},
        "versions": {"sdxl_ref": sdxl_ref.__version__, "torch": torch.__version__},
    }
    assert {name: made[name] for name in expected} == expected
    plan = pipe.plan(pipe.request(**call))
    assert made["plan"] == str(plan)
    assert made["sigmas"] == plan.grid.sigmas.tolist()
    assert not {"image", "latents", "generator"} & set(made)
    fields = readers.web_ui(picture.info["parameters"])
    assert (fields["Prompt"], fields["Negative prompt"]) == ("a cup", "blurry")
    assert (fields["Sampler"], fields["Schedule type"], fields["Seed"]) == ("DPM++ 2M", "Karras", "7")
    assert (fields["Size"], fields["Model"]) == ("72x64", tiny_base_file.name.removesuffix(".safetensors"))
    assert "Model hash" not in fields  # which would take reading the whole file


def test_it_can_be_kept_in_a_png(tmp_path: Path) -> None:
    [picture] = pairs.base()(**SHORT, generator=seeded(1)).images
    picture.save(tmp_path / "a.png", pnginfo=png_chunks(picture.info))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {name: picture.info[name] for name in ("parameters", "sdxl_ref")}  # type: ignore[attr-defined]
    assert readers.sd_parsers(tmp_path / "a.png").samplers[0].prompts[0].value == "a cup"
    assert load_image(tmp_path / "a.png").info == {}


def test_the_settings_make_the_picture_again() -> None:
    [picture] = pairs.base()(**SHORT, sampler="euler_ancestral", eta=0.5, generator=seeded(3)).images
    made = recorded(picture)
    again = {name: made[name] for name in (*SHORT, "sampler", "eta", "spacing", "karras", "guidance_scale")}
    [other] = pairs.base()(**again, generator=seeded(made["seed"])).images
    assert np.array_equal(np.asarray(other), np.asarray(picture))


def test_each_picture_has_its_own_prompt_and_seed() -> None:
    call = SHORT | {"prompt": ["a cup", "a cat"], "negative_prompt": ["x", "y"]}
    pictures = pairs.base()(**call, num_images_per_prompt=2, generator=seeds(5, 6, 7, 8)).images
    found = [recorded(picture) for picture in pictures]
    assert [made["prompt"] for made in found] == ["a cup", "a cup", "a cat", "a cat"]
    assert [made["negative_prompt"] for made in found] == ["x", "x", "y", "y"]
    assert [made["seed"] for made in found] == [5, 6, 7, 8]
    assert [(made["number"], made["images"]) for made in found] == [(i, 4) for i in range(4)]
    together = pairs.base()(**call, generator=seeded(5)).images
    assert [recorded(picture)["seed"] for picture in together] == [5, 5]


def used() -> torch.Generator:
    generator = seeded(7)
    torch.randn(1, generator=generator)
    return generator


@pytest.mark.parametrize("make", [used, lambda: None], ids=["used", "none"])
def test_a_seed_that_would_not_make_the_picture_again_is_left_out(make: Callable[[], Any]) -> None:
    """That of a generator that has drawn before, or of one that the system seeds."""
    [picture] = pairs.base()(**SHORT, generator=make()).images
    assert recorded(picture)["seed"] is None
    assert "Seed" not in readers.web_ui(picture.info["parameters"])


def test_the_ensemble_tells_both_models(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    pipe = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    [picture] = pipe(**SHORT | {"num_inference_steps": 6}, switch=0.5, generator=seeded(0)).images
    made = recorded(picture)
    assert made["checkpoint"] == {"file": tiny_base_file.name}
    assert made["refiner_checkpoint"] == {"file": tiny_refiner_file.name}
    assert made["switch"] == 0.5
    assert "refiner" in made["plan"]


def test_a_refiner_that_starts_from_a_picture() -> None:
    call = pairs.request(strength=0.5, output_type="pil", generator=seeded(2))
    [picture] = pairs.refiner()(**call).images
    assert readers.web_ui(picture.info["parameters"])["Denoising strength"] == "0.5"
    assert recorded(picture)["size"] == "128x96"


def test_active_adapters_are_told(tmp_path: Path) -> None:
    pipe = ImageToImagePipeline(pairs.REFINER, **pairs.own_networks("refiner"))
    layer = "lora_unet_middle_block_1_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(64, 1)}
    save_file(factors, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors")
    pipe.set_adapters("style", 0.5)
    call = pairs.request(output_type="pil", generator=seeded(2))
    assert recorded(pipe(**call).images[0])["adapters"] == {"style": 0.5}
    pipe.unload_lora_weights()
    assert recorded(pipe(**call).images[0])["adapters"] == {}


def test_a_watermark_is_told_and_does_not_lose_the_settings() -> None:
    [picture] = pairs.base()(**SHORT | {"height": 256, "width": 256}, watermark=True, generator=seeded(0)).images
    assert recorded(picture)["watermark"] is True


def test_settings_that_are_no_json_do_not_cost_the_picture() -> None:
    [picture] = pairs.base()(**SHORT, guidance_scale=np.float32(2.0), generator=seeded(0)).images
    assert recorded(picture)["guidance_scale"] == 2.0


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_other_results_carry_none(output_type: str) -> None:
    assert not hasattr(pairs.base()(**SHORT, output_type=output_type, generator=seeded(0)).images, "info")


def test_both_models_of_an_ensemble_say_how_they_are_run() -> None:
    """Each has its own prediction, and its own negative side where no negative prompt is given."""
    pipe = pairs.ensemble()
    pipe.refiner.config = replace(pipe.refiner.config, prediction="v")
    [picture] = pipe(**SHORT | {"num_inference_steps": 10}, generator=seeded(1)).images
    made = recorded(picture)
    assert (made["prediction"], made["refiner_prediction"]) == ("epsilon", "v")
    assert (made["unconditional"], made["refiner_unconditional"]) == ("zeros", "empty prompt encoded")


def test_embeds_and_masks_are_told_and_not_written_out() -> None:
    pipe = pairs.refiner()
    embeds = pipe.encode_prompt("a cup", negative_prompt="blurry")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    call = {"image": Image.new("RGB", (64, 64)), "mask_image": mask, "strength": 0.5, "num_inference_steps": 4}
    [picture] = pipe(**embeds._asdict(), **call, generator=seeded(7)).images
    made = recorded(picture)
    assert made["unconditional"] == "embeds handed in"
    assert (made["prompt"], made["prompt_syntax"], made["clip_skip"]) == (None, "plain", None)
    assert not {"mask_image", *embeds._asdict()} & set(made)
    assert picture.info["parameters"].startswith("\nSteps: 4, ")
