"""Folders that diffusers wrote open here, and those written here open there, with the same results."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from sdxl_ref.pipelines import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.weights.folder import open_folder
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.convert import convert


def test_diffusers_opens_our_folder_and_gives_our_latents(official: Path, converted: Path) -> None:
    theirs = diffusers.DiffusionPipeline.from_pretrained(converted, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": "a cup of coffee", "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    if open_checkpoint(official).config.kind == "refiner":
        assert type(theirs).__name__ == "StableDiffusionXLImg2ImgPipeline"
        image = torch.rand(1, 3, 64, 64, generator=generator)
        arguments |= {"image": image, "strength": 0.5}
        ours: Any = ImageToImagePipeline.from_single_file(converted)
    else:
        arguments |= {"latents": torch.randn(1, 4, 8, 8, generator=generator), "height": 64, "width": 64}
        ours = TextToImagePipeline.from_single_file(converted)
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(1)).images
    found = ours(**arguments, generator=torch.Generator().manual_seed(1)).images
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize(
    ("shards", "variant"),
    [
        pytest.param(False, None, id="whole"),
        pytest.param(True, "fp16", id="sharded-fp16"),
        pytest.param(True, None, id="sharded", marks=pytest.mark.sweep),
        pytest.param(False, "fp16", id="whole-fp16", marks=pytest.mark.sweep),
    ],
)
def test_a_folder_that_diffusers_wrote_opens_here(
    official: Path, converted: Path, tmp_path: Path, shards: bool, variant: str | None
) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(converted, torch_dtype=torch.float16)
    size = "3MB" if shards else "10GB"
    pipeline.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)
    indices = list((tmp_path / "theirs").glob("*/*.index*.json"))
    assert bool(indices) == shards
    opened = open_folder(tmp_path / "theirs", variant)
    expected = load_file(official)
    with opened.reader() as read:
        for key in opened.shapes:
            assert torch.equal(read(key), expected[key]), key
    convert(tmp_path / "theirs", tmp_path / "back.safetensors", "official", variant=variant)
    assert open_checkpoint(tmp_path / "back.safetensors").config == open_checkpoint(official).config
    if variant:
        alone = open_folder(tmp_path / "theirs")
        assert "there is the variant 'fp16' alone, which is used" in alone.note
        assert alone.files() == opened.files()


def test_a_variant_is_written_under_its_names(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "folder", "diffusers", variant="fp16")
    assert (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", variant="fp16", torch_dtype=torch.float16)
