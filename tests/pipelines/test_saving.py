"""`save_pretrained`: a folder that opens again, bit for bit, or a reason."""

import os
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from safetensors.torch import save_file

from sdxl_ref import DiffusionPipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import Defaults, InputError
from sdxl_ref.weights.checkpoint import prefixes
from weights_convert.cli import main as weights_convert


def assert_same(a: Any, b: Any) -> None:
    assert (type(a), a.config, a.defaults) == (type(b), b.config, b.defaults)
    for part in prefixes(a.config):
        first, second = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert list(first) == list(second)
        for key, tensor in first.items():
            assert tensor.dtype == second[key].dtype, key
            assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_it_opens_again_bit_for_bit(kind: str, tiny_base_file: Path, tiny_refiner_file: Path, tmp_path: Path) -> None:
    """Each network in its dtype: the VAE in float32 beside others in float16."""
    file = {"base": tiny_base_file, "refiner": tiny_refiner_file}[kind]
    pipe = DiffusionPipeline.from_pretrained(file, torch_dtype=torch.float16)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1e-6)  # no number of float16
    pipe.save_pretrained(tmp_path / "new" / "folder")
    again = DiffusionPipeline.from_pretrained(tmp_path / "new" / "folder", torch_dtype=torch.float16)
    assert_same(pipe, again)
    assert os.listdir(tmp_path / "new" / "folder") == [f"sdxl_{kind}.safetensors"]


def test_it_replaces_its_own_file_and_not_another_model(tiny_base_file: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        next(again.unet.parameters()).zero_()
    again.save_pretrained(str(tmp_path))
    assert_same(again, TextToImagePipeline.from_pretrained(tmp_path))
    with pytest.raises(InputError, match=r"holds another model \(sdxl_base.safetensors\): name a folder of its own"):
        pairs.refiner().save_pretrained(tmp_path)


def test_how_a_folder_said_that_its_model_is_run_is_kept(tiny_refiner_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert weights_convert(["convert", str(tiny_refiner_file), str(folder), "--to", "diffusers"]) == 0
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("leading", "trailing"))
    pipe = ImageToImagePipeline.from_pretrained(folder)
    assert pipe.defaults.spacing == "trailing"
    pipe.save_pretrained(tmp_path / "saved")
    again = ImageToImagePipeline.from_pretrained(tmp_path / "saved")
    assert_same(pipe, again)
    again.save_pretrained(tmp_path / "twice")
    assert_same(pipe, ImageToImagePipeline.from_pretrained(tmp_path / "twice"))


def test_it_converts_to_diffusers_layout(tiny_refiner_file: Path, tmp_path: Path) -> None:
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "sdxl_refiner.safetensors"
    assert weights_convert(["convert", str(file), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert_same(pipe, ImageToImagePipeline.from_pretrained(tmp_path / "folder"))


def test_a_variant_is_told_not_to_be_used(tiny_base_file: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the variant 'fp16' is not used") as record:
        TextToImagePipeline.from_pretrained(tiny_base_file).save_pretrained(tmp_path, variant="fp16")
    assert record[0].filename == __file__


# --- what is refused, and then nothing is written -----------------------------------------------------------------


def with_adapter(pipe: Any, folder: Path) -> None:
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q"
    width = pipe.unet.get_submodule("middle_block.1.transformer_blocks.0.attn2.to_q").in_features
    factors = {f"{key}.lora_down.weight": torch.ones(1, width), f"{key}.lora_up.weight": torch.ones(width, 1)}
    save_file(factors | {f"{key}.alpha": torch.tensor(1.0)}, folder / "style.safetensors")
    pipe.load_lora_weights(folder / "style.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pipe, folder: pipe.pack(), r"call pipe.unpack\(\) first"),
        (with_adapter, r"the adapters style are on unet: call pipe.unload_lora_weights\(\) first"),
        (lambda pipe, folder: setattr(pipe, "defaults", Defaults(sampler="heun")), "pipe.defaults is not what"),
        (lambda pipe, folder: setattr(pipe, "vae", torch.nn.Linear(1, 1)), "replaced by one of other names or sizes"),
    ],
    ids=["packed", "adapter", "defaults", "stranger"],
)
def test_what_is_refused(spoil: Any, message: str, tiny_base_file: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file, dtype=torch.float32)
    spoil(pipe, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        pipe.save_pretrained(tmp_path / "saved")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "saved").exists()


def test_refused_by_the_arguments(tmp_path: Path, tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    with pytest.raises(InputError, match=r"call ensemble.base.save_pretrained\(…\) and ensemble.refiner"):
        pairs.ensemble().save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="never a pickle"):
        pairs.base().save_pretrained(tmp_path / "saved", safe_serialization=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"could not write .*file"):
        pairs.base().save_pretrained(tmp_path / "file")
