"""The files of a diffusers folder besides its weights: configurations, scheduler, tokenizers, index.

Field names and values are those that diffusers 0.42 and transformers 5 write, and that the hub's folders of SD-XL 1.0
have. Sources: `UNet2DConditionModel`, `AutoencoderKL`, `EulerDiscreteScheduler`, `CLIPTextConfig`, `CLIPTokenizer`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.text.tokenizer import LETTERS, merges
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.folder_config import CLASSES as NETWORKS
from sdxl_ref.weights.folder_scheduler import SCHEDULER_CONFIG
from sdxl_ref.weights.tensor_files import FOLDER_INDEX

Json = dict[str, Any]
DIFFUSERS = "0.19.0"  # the version whose fields these are
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
END_OF_TEXT = "<|endoftext|>"
CLASSES = NETWORKS | {
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
ABSENT = [None, None]  # the class of a part that a model has not
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def weights_name(part: str, variant: str | None) -> str:
    """Where the weights of a part lie in the folder."""
    middle = f".{variant}" if variant else ""
    return f"{part}/{WEIGHTS[part]}{middle}.safetensors"


def configurations(config: ModelConfig) -> dict[str, Json]:
    """The fields of each configuration file of a folder, by its name in it, for a model that lies in no folder yet."""
    prediction_type = {"epsilon": "epsilon", "v": "v_prediction"}[config.prediction]
    files = {FOLDER_INDEX: model_index(config), SCHEDULER_CONFIG: SCHEDULER | {"prediction_type": prediction_type}}
    return files | {config_name(part): part_config(part, config) for part in prefixes(config)}


def config_name(part: str) -> str:
    """Where the configuration of a part lies in the folder."""
    return f"{part}/config.json"


def write_configurations(folder: Path, configurations: Mapping[str, Json], tokenizers: Mapping[str, Path]) -> None:
    """Make a folder with all but the weights. `tokenizers` are those to copy; the others are written."""
    folder.mkdir()
    for name, fields in configurations.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, fields)
    pads = {"tokenizer": END_OF_TEXT, "tokenizer_2": "!"}
    for name, pad in pads.items():
        if name in tokenizers:
            shutil.copytree(tokenizers[name], folder / name)
        elif configurations[FOLDER_INDEX].get(name) not in (None, ABSENT):
            write_tokenizer(folder / name, pad)


def write_json(path: Path, fields: Json) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def model_index(config: ModelConfig) -> Json:
    """`model_index.json`: the pipeline, and the class of each part. A refiner has no first text encoder."""
    index: Json = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": DIFFUSERS}
    index["force_zeros_for_empty_prompt"] = config.kind == "base"
    classes: Json = dict(CLASSES)
    if config.kind == "refiner":
        index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
        index["requires_aesthetics_score"] = True
        classes["text_encoder"] = ABSENT
        classes["tokenizer"] = ABSENT
    return index | dict(sorted(classes.items()))


def part_config(part: str, config: ModelConfig) -> Json:
    """`config.json` of a part."""
    if part == "unet":
        return unet(config.unet, config.resolution // 8)
    if part == "vae":
        return vae(config.vae, config.resolution)
    encoder = config.text_encoders[0] if part == "text_encoder" else config.text_encoders[-1]
    return text_encoder(encoder, CLASSES[part][1])


def unet(config: UNetConfig, sample_size: int) -> Json:
    """The fields of `UNet2DConditionModel`."""
    levels = range(len(config.channel_mult))
    widths = [config.model_channels * multiplier for multiplier in config.channel_mult]
    down_blocks = ["CrossAttnDownBlock2D" if config.has_attention(level) else "DownBlock2D" for level in levels]
    depth = config.transformer_depth
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [width // config.num_head_channels for width in widths],  # means the number of heads
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": down_blocks,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.adm_in_channels,
        "resnet_time_scale_shift": "default",
        "sample_size": sample_size,
        "transformer_layers_per_block": depth if isinstance(depth, int) else list(config.depths),
        "up_block_types": [block.replace("Down", "Up") for block in reversed(down_blocks)],
        "use_linear_projection": True,
    }


def vae(config: VAEConfig, sample_size: int) -> Json:
    """The fields of `AutoencoderKL`."""
    levels = len(config.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "block_out_channels": [config.ch * multiplier for multiplier in config.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": 32,
        "out_channels": config.out_ch,
        "sample_size": sample_size,
        "scaling_factor": config.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder(config: TextEncoderConfig, architecture: str) -> Json:
    """The fields of `CLIPTextConfig`."""
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        "dropout": 0.0,
        "eos_token_id": 49407,  # transformers takes 2 for an older way of finding the end of the text
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * config.width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.embed_dim,
        "vocab_size": config.vocab_size,
    }


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's vocabulary and merges as transformers reads them, made of open_clip's; `pad` is the padding token."""
    folder.mkdir()
    ends = [letter + "</w>" for letter in LETTERS]
    words = ["".join(pair) for pair in merges()]
    vocabulary = [*LETTERS, *ends, *words, "<|startoftext|>", END_OF_TEXT]
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges()), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    tokens: Json = {
        "bos_token": "<|startoftext|>",
        "eos_token": END_OF_TEXT,
        "pad_token": pad,
        "unk_token": END_OF_TEXT,
    }
    write_json(folder / "special_tokens_map.json", tokens)
    settings = {"model_max_length": 77, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", tokens | settings | {"tokenizer_class": "CLIPTokenizer"})
