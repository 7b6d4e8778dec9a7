"""The configuration files of a folder in diffusers' layout -> our configurations.

A field that changes what is computed and that no size of ours stands for has to have SDXL's value. Source: the
`config.json` of `UNet2DConditionModel`, `AutoencoderKL` (diffusers) and `CLIPTextConfig` (transformers).
"""

import json
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.weights.fitting import require_fit
from sdxl_ref.weights.regular import check_regular
from sdxl_ref.weights.strangers import require_no_other_part
from sdxl_ref.weights.tensor_files import FOLDER_INDEX

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
CLASSES = {  # of each part, as the index names them
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
UNET = {  # fields that change what is computed and no size of ours stands for, with SDXL's values
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT = {"layer_norm_eps": 1e-5, "max_position_embeddings": 77, "model_type": "clip_text_model", "vocab_size": 49408}
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """An object from a JSON file. InputError where it is none."""
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file {path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(value).__name__}")
    return value


def model_config(folder: Path) -> ModelConfig:
    """The sizes of all parts, from their `config.json`. InputError where a field means another architecture."""
    index = read_json(folder / FOLDER_INDEX)
    require_no_other_part(index, folder / FOLDER_INDEX)
    parts = [part for part in CLASSES if part != "text_encoder" or index.get(part) not in (None, [None, None])]
    for part in parts:
        if index.get(part) != CLASSES[part]:
            mismatch = f"expected {part} {CLASSES[part]}, found {index.get(part)}"
            raise InputError(f"{folder / FOLDER_INDEX} is no SDXL pipeline: {mismatch}")
    scheduler = folder / SCHEDULER_CONFIG
    if scheduler.is_file():
        require(scheduler, read_json(scheduler), SCHEDULER)
    paths = {part: folder / part / "config.json" for part in parts}
    configs = {part: read_json(path) for part, path in paths.items()}
    try:
        unet = unet_config(paths["unet"], configs["unet"])
        vae = vae_config(paths["vae"], configs["vae"])
        encoders = tuple(text_config(paths[part], configs[part]) for part in parts if part.startswith("text"))
        config = ModelConfig(unet, encoders, vae, 8 * int(configs["unet"].get("sample_size", 128)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{folder}: a config.json lacks or garbles a field of an SDXL model ({error!r})") from error
    require_fit(config, folder)
    return config


def require(path: Path, fields: Json, expected: Json) -> None:
    """InputError where a field has another value than expected. One that is absent, or null for false, agrees."""
    for key, value in expected.items():
        if (fields.get(key, value) or None) != (value or None):
            raise InputError(f"{path} is not SDXL's: expected {key} {value!r}, found {fields[key]!r}")


def unet_config(path: Path, c: Json) -> UNetConfig:
    """diffusers' `UNet2DConditionModel` -> ours."""
    widths = c["block_out_channels"]
    heads = c["attention_head_dim"]  # which means the number of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    channels = widths[-1] // heads[-1]
    crossed = [kind.startswith("CrossAttn") for kind in c["down_block_types"]]
    kinds = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed]
    expected = UNET | {"attention_head_dim": [width // channels for width in widths], "down_block_types": kinds}
    expected["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    require(path, c | {"attention_head_dim": heads}, expected)
    depth = c["transformer_layers_per_block"]
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=widths[0],
        num_res_blocks=c["layers_per_block"],
        channel_mult=tuple(width // widths[0] for width in widths),
        attention_resolutions=tuple(2**i for i, cross in enumerate(crossed) if cross)[::-1],
        num_head_channels=channels,
        transformer_depth=depth if isinstance(depth, int) else tuple(depth),
        context_dim=c["cross_attention_dim"],
        adm_in_channels=c["projection_class_embeddings_input_dim"],
    )


def vae_config(path: Path, c: Json) -> VAEConfig:
    """diffusers' `AutoencoderKL` -> ours."""
    widths = c["block_out_channels"]
    levels = len(widths)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    require(path, c, VAE | kinds)
    return VAEConfig(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=c["layers_per_block"],
        z_channels=c["latent_channels"],
        embed_dim=c["latent_channels"],
        in_channels=c["in_channels"],
        out_ch=c["out_channels"],
        scale_factor=c["scaling_factor"],
    )


def text_config(path: Path, c: Json) -> TextEncoderConfig:
    """transformers' `CLIPTextConfig` -> ours."""
    require(path, c, TEXT | {"intermediate_size": 4 * c["hidden_size"]})
    return TextEncoderConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        layers=c["num_hidden_layers"],
        embed_dim=c["projection_dim"],
        activation=c["hidden_act"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
    )
