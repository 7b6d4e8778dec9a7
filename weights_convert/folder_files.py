"""The files of a diffusers folder besides its weights: configurations, scheduler, tokenizers, index.

Field names and values are those that diffusers 0.42 and transformers 5 write, and that the hub's folders of SD-XL 1.0
have. Sources: `UNet2DConditionModel`, `AutoencoderKL`, `EulerDiscreteScheduler`, `CLIPTextConfig`, `CLIPTokenizer`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.folder import CLASSES as NETWORKS

Json = dict[str, Any]
DIFFUSERS = "0.19.0"  # the version whose fields these are
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
CLASSES = NETWORKS | {
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
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


def model_index(config: ModelConfig) -> Json:
    """`model_index.json`: the pipeline, and the class of each part. A refiner has no first text encoder."""
    refiner = config.kind == "refiner"
    name = "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"
    index: Json = {"_class_name": name, "_diffusers_version": DIFFUSERS, "force_zeros_for_empty_prompt": not refiner}
    if refiner:
        index["requires_aesthetics_score"] = True
    absent = ("text_encoder", "tokenizer") if refiner else ()
    return index | {part: [None, None] if part in absent else kind for part, kind in sorted(CLASSES.items())}


def part_config(part: str, config: ModelConfig) -> Json:
    """`config.json` of a part."""
    if part == "unet":
        return unet(config.unet, config.resolution // 8)
    if part == "vae":
        return vae(config.vae, config.resolution)
    position = 0 if part == "text_encoder" else -1
    return text_encoder(config.text_encoders[position], CLASSES[part][1])


def unet(c: UNetConfig, sample_size: int) -> Json:
    levels = range(len(c.channel_mult))
    widths = [c.model_channels * multiplier for multiplier in c.channel_mult]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [width // c.num_head_channels for width in widths],  # means the number of heads
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": c.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if c.has_attention(i) else "DownBlock2D" for i in levels],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c.in_channels,
        "layers_per_block": c.num_res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": c.out_channels,
        "projection_class_embeddings_input_dim": c.adm_in_channels,
        "resnet_time_scale_shift": "default",
        "sample_size": sample_size,
        "transformer_layers_per_block": c.transformer_depth if isinstance(c.transformer_depth, int) else [*c.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if c.has_attention(i) else "UpBlock2D" for i in reversed(levels)],
        "use_linear_projection": True,
    }


def vae(c: VAEConfig, sample_size: int) -> Json:
    levels = len(c.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "block_out_channels": [c.ch * multiplier for multiplier in c.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": c.in_channels,
        "latent_channels": c.z_channels,
        "layers_per_block": c.num_res_blocks,
        "norm_num_groups": 32,
        "out_channels": c.out_ch,
        "sample_size": sample_size,
        "scaling_factor": c.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder(c: TextEncoderConfig, architecture: str) -> Json:
    """The end-of-text id is 49407; transformers takes 2 for an older way of finding it."""
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        "dropout": 0.0,
        "eos_token_id": 49407,
        "hidden_act": c.activation,
        "hidden_size": c.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * c.width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": c.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "pad_token_id": 1,
        "projection_dim": c.embed_dim,
        "vocab_size": c.vocab_size,
    }


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's vocabulary and merges as transformers reads them, made of open_clip's; `pad` is the padding token."""
    merges = open_clip_merges()
    letters = list(byte_letters().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    tokens["unk_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2))
    rest = {"model_max_length": 77, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    config = tokens | rest | {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def open_clip_merges() -> list[str]:
    """The 48,894 byte pairs that open_clip's tokenizer uses, from its package's file."""
    package = importlib.util.find_spec("open_clip")  # finds, does not import
    if package is None or package.origin is None:
        raise ImportError("open_clip_torch is not installed: pip install open_clip_torch")
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2's byte-pair encoding has it (Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
