"""Other models and lone parts are told by the names of their tensors, as their own libraries give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import peers
import pytest
import torch
from checkpoints import BASE, error_of, expected_shapes, sparse_file
from torch import nn

from sdxl_ref.cli import main
from sdxl_ref.weights.checkpoint import LABEL
from sdxl_ref.weights.file_saving import write_text
from sdxl_ref.weights.opening import POCKET
from weights_convert.convert import convert

Shapes = dict[str, tuple[int, ...]]
SMALL = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 32}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def shapes_of(build: Callable[[], nn.Module], prefix: str = "") -> Shapes:
    """The names and shapes of a peer's network."""
    with torch.device("meta"):
        state = build().state_dict()
    return {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}


def controlnet() -> nn.Module:
    return diffusers.ControlNetModel(down_block_types=BLOCKS["down_block_types"], **SMALL)


def ip_adapter() -> Shapes:
    """As diffusers' and the authors' files are flattened."""
    return {"image_proj.proj.weight": (8192, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)}


def sd(width: int) -> Shapes:
    """A UNet in official names that reads a text context of this width, and no vector."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), key: (320, width)}


PEERS: dict[str, tuple[Callable[[], Shapes], str]] = {
    "diffusers' ControlNet": (lambda: shapes_of(controlnet), "a ControlNet"),
    "the authors' ControlNet": (lambda: {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
    "diffusers' ControlNet-Union": (
        lambda: shapes_of(
            lambda: diffusers.ControlNetUnionModel(
                down_block_types=BLOCKS["down_block_types"], addition_time_embed_dim=8, **SMALL
            )
        ),
        "a ControlNet",
    ),
    "a Control-LoRA": (lambda: {"lora_controlnet": (), "input_hint_block.0.up": (16, 1)}, "a ControlNet, as a LoRA"),
    "LLLite": (
        lambda: {"lllite_unet_input_blocks_4_1.conditioning1.0.weight": (8, 3, 4, 4)},
        "a ControlNet, as a LoRA",
    ),
    "IP-Adapter": (ip_adapter, "an IP-Adapter"),
    "diffusers' T2I-Adapter": (
        lambda: shapes_of(lambda: diffusers.T2IAdapter(channels=[32, 64, 64, 64], adapter_type="full_adapter_xl")),
        "a T2I-Adapter",
    ),
    "the authors' T2I-Adapter": (
        lambda: {"body.0.in_conv.weight": (640, 320, 1, 1), "conv_in.weight": (320, 768, 3, 3)},
        "a T2I-Adapter",
    ),
    "a motion adapter": (
        lambda: shapes_of(
            lambda: diffusers.MotionAdapter(
                block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8
            )
        ),
        "a motion module (AnimateDiff)",
    ),
    "SD 1.x": (
        lambda: sd(768) | {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768)},
        "an SD 1.x model",
    ),
    "SD 2.x": (lambda: sd(1024) | {"cond_stage_model.model.ln_final.weight": (1024,)}, "an SD 2.x model"),
    "a UNet of SD 1.x": (lambda: sd(768), "an SD 1.x model"),
    "a UNet of SD 2.x": (lambda: sd(1024), "an SD 2.x model"),
    "diffusers' UNet of SD 1.x": (
        lambda: shapes_of(lambda: diffusers.UNet2DConditionModel(**BLOCKS, **SMALL | {"cross_attention_dim": 768})),
        "an SD 1.x model",
    ),
    "SD 3": (
        lambda: {"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)},
        "an SD 3 model",
    ),
    "diffusers' SD 3": (
        lambda: shapes_of(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16
            )
        ),
        "an SD 3 model",
    ),
    "Flux": (lambda: {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "a Flux model"),
    "diffusers' Flux": (
        lambda: shapes_of(
            lambda: diffusers.FluxTransformer2DModel(
                num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4)
            )
        ),
        "a Flux model",
    ),
    "a LoRA of Flux": (
        lambda: {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (16, 3072)},
        "an adapter (LoRA)",
    ),
    "kohya's LoRA": (lambda: {"lora_unet_mid_block_attentions_0_proj_in.alpha": ()}, "an adapter (LoRA)"),
    "PEFT's LoRA": (lambda: {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "an adapter (LoRA)"),
    "a LoHa": (lambda: {"lycoris_mid_block.hada_w1_a": (4, 8)}, "an adapter (LoRA)"),
    "an embedding": (lambda: {"clip_l": (4, 768), "clip_g": (4, 1280)}, "a textual inversion (an embedding)"),
    "an older embedding": (lambda: {"emb_params": (4, 768)}, "a textual inversion (an embedding)"),
    "our latents": (lambda: {"latents": (1, 4, 16, 16)}, "latents"),
    "TAESD": (
        lambda: shapes_of(lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(32,) * 4)),
        "a small autoencoder (TAESD)",
    ),
    "a VAE": (lambda: below("first_stage_model."), "an autoencoder alone"),
    "a VAE with its prefix": (lambda: starting("first_stage_model."), "an autoencoder alone"),
    "diffusers' VAE": (lambda: shapes_of(lambda: peers.vae2d(BASE.vae)), "an autoencoder alone"),
    "a UNet": (lambda: starting("model.diffusion_model."), "a UNet without text encoders"),
    "a UNet and its VAE": (lambda: starting("model.", "first_stage"), "a UNet without text encoders"),
    "diffusers' UNet of SDXL": (
        lambda: shapes_of(lambda: peers.unet2d(BASE.unet, diffusers.UNet2DConditionModel)),
        "a UNet without text encoders",
    ),
    "a text encoder": (lambda: below("conditioner.embedders.1.model."), "a text encoder alone"),
    "transformers' text encoder": (
        lambda: {"text_model.encoder.layers.0.layer_norm1.weight": (768,)},
        "a text encoder alone",
    ),
}


def starting(*prefixes: str) -> Shapes:
    """The base's tensors with these beginnings."""
    return {key: shape for key, shape in expected_shapes(BASE).items() if key.startswith(prefixes)}


def below(prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in starting(prefix).items()}


@pytest.mark.parametrize("name", PEERS)
def test_another_model_is_told_as_what_it_is(name: str, tmp_path: Path) -> None:
    shapes, what = PEERS[name]
    path = sparse_file(tmp_path / "a.safetensors", shapes())
    line = error_of(path)
    assert line.startswith(f"{path} is {what}, no SDXL base or refiner: ")
    assert "\n" not in line


@pytest.mark.parametrize("keys", [["some.weight", "other.bias"], []], ids=["unknown", "nothing"])
def test_what_nothing_is_known_of_is_told_by_its_names(keys: list[str], tmp_path: Path) -> None:
    line = error_of(sparse_file(tmp_path / "a.safetensors", dict.fromkeys(keys, (4,))))
    found = ", ".join(sorted(key.split(".")[0] for key in keys)) or "no tensors"
    assert line.endswith(f"is no SDXL checkpoint in the official layout: no {LABEL}, found keys of {found}")


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_controlnets_folder(tmp_path: Path) -> None:
    """As diffusers' own `save_pretrained` writes it."""
    controlnet().save_pretrained(tmp_path / "c")
    assert "diffusion_pytorch_model.safetensors is a ControlNet, no SDXL base or refiner" in error_of(tmp_path / "c")


@pytest.mark.parametrize(
    ("part", "classes", "what"),
    [
        ("controlnet", ["diffusers", "ControlNetModel"], "a ControlNet"),
        ("adapter", ["diffusers", "T2IAdapter"], "a T2I-Adapter"),
        ("motion_adapter", ["diffusers", "MotionAdapter"], "a motion module (AnimateDiff)"),
        ("image_encoder", ["transformers", "CLIPVisionModelWithProjection"], "an image encoder (IP-Adapter)"),
        ("transformer", ["diffusers", "FluxTransformer2DModel"], "a transformer (SD 3, Flux or another model)"),
    ],
)
def test_a_folder_with_another_part(
    part: str, classes: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would change the picture, and is not left out in silence."""
    convert(POCKET["pocket-base"], tmp_path / "model", "diffusers")
    index = tmp_path / "model" / "model_index.json"
    text = index.read_text()
    write_text(index, text.replace("{", f'{{"{part}": ["{classes[0]}", "{classes[1]}"],', 1))
    assert main(["info", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert f"model_index.json names a part {part}, {what}: " in error
    assert error.count("\n") == 1
    write_text(
        index, text.replace("{", f'{{"{part}": [null, null],', 1)
    )  # as diffusers writes a part that is not there
    assert main(["info", str(tmp_path / "model")]) == 0
