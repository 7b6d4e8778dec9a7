"""Folders that are refused: files that are missing, damaged or elsewhere, and other architectures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ref.config import InputError
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.opening import open_checkpoint


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def vae_names(folder: Path) -> list[str]:
    return list(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))


def test_bad_folders(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_checkpoint(folder)

    shard(folder, dict.fromkeys(vae_names(folder), "part.safetensors"))
    refused("expected one file of weights in .*: remove one")
    weights.rename(folder / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(folder / "elsewhere.safetensors"), "..\\x.safetensors"):
        shard(folder, {"a": name})
        refused("expected a safetensors file in the same folder|which is not there")
    shard(folder, {"a": "part.safetensors"})
    refused("names the shard part.safetensors, which is not there")
    shutil.copy(folder / "elsewhere.safetensors", folder / "vae" / "part.safetensors")
    refused("names 1 tensors that its shards do not hold: a")
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "vae" / "part.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    refused("pickles are not opened")
    shutil.copy(folder / "elsewhere.safetensors", weights)
    open_checkpoint(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("expected a whole safetensors file")


OTHERS = [  # file, field, value, what is said of it
    ("unet/config.json", "layers_per_block", 3, "missing"),
    ("unet/config.json", "block_out_channels", None, "expected block_out_channels to be a list of whole numbers"),
    ("vae/config.json", "latent_channels", 16, "channels of the VAE: expected"),
    ("model_index.json", "unet", [None, None], "no SDXL pipeline: expected unet .*, found .None, None."),
    ("model_index.json", "vae", ["diffusers", "AutoencoderTiny"], "no SDXL pipeline: expected vae"),
    ("model_index.json", "text_encoder_2", [None, None], "no SDXL pipeline: expected text_encoder_2"),
    ("model_index.json", "text_encoder_2", None, "no SDXL pipeline: expected text_encoder_2"),
    ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type"),
    *(
        (f"{part}/config.json", field, value, f"{part}/config.json is not SDXL's: expected {field} .*, found ")
        for part, field, value in (
            ("unet", "_class_name", "FluxTransformer2DModel"),
            ("unet", "norm_num_groups", 16),
            ("unet", "act_fn", "gelu"),
            ("unet", "attention_head_dim", 8),
            ("unet", "up_block_types", ["UpBlock2D"] * 4),
            ("unet", "use_linear_projection", None),
            ("unet", "resnet_time_scale_shift", "scale_shift"),
            ("vae", "_class_name", "AutoencoderTiny"),
            ("vae", "norm_num_groups", 16),
            ("vae", "act_fn", "relu"),
            ("vae", "latents_mean", [0.1, 0.2, 0.3, 0.4]),
            ("text_encoder_2", "intermediate_size", 128),
            ("text_encoder_2", "vocab_size", 30000),
            ("text_encoder_2", "max_position_embeddings", 512),
            ("text_encoder_2", "layer_norm_eps", 1e-6),
        )
    ),
]


def test_folders_of_another_architecture(folder: Path) -> None:
    """Each field alone, in a folder that opens without the change."""
    for file, field, value, message in OTHERS:
        text = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(text) | {field: value}))
        with pytest.raises(InputError, match=message):
            open_checkpoint(folder)
        (folder / file).write_text(text)
    config = json.loads((folder / "unet" / "config.json").read_text())
    absent = {key: value for key, value in config.items() if key not in ("act_fn", "norm_num_groups")}
    said = {"dual_cross_attention": None, "only_cross_attention": None, "class_embed_type": None}  # as the hub's say it
    (folder / "unet" / "config.json").write_text(json.dumps(absent | said))
    assert open_checkpoint(folder).config.kind == "refiner"


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.bias", "unet.conv_in.weight"]
)
def test_the_file_of_extras_holds_nothing_else(folder: Path, name: str) -> None:
    """A tensor in it would stand in for that of the part, unseen."""
    extras = load_file(folder / EXTRAS_FILE)
    save_file(extras | {name: torch.zeros(1)}, folder / EXTRAS_FILE)
    with pytest.raises(InputError, match=f"{EXTRAS_FILE} holds {name}, expected what the parts have no place for"):
        open_checkpoint(folder)
    save_file(extras | {"denoiser.sigmas": torch.zeros(1000)}, folder / EXTRAS_FILE)
    assert "denoiser.sigmas" in open_checkpoint(folder).shapes
