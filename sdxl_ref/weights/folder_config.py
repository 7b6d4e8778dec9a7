"""The configuration files of a folder in diffusers' layout -> our configurations.

A field is a size of ours, or has to have SDXL's value, or has no effect on what is computed; one that is none of these
is refused. Source: the `config.json` of `UNet2DConditionModel`, `AutoencoderKL` (diffusers) and `CLIPTextConfig`
(transformers), and the constructors of the SDXL pipelines.
"""

import json
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.weights.fitting import require_fit
from sdxl_ref.weights.regular import check_regular
from sdxl_ref.weights.strangers import require_no_other_part
from sdxl_ref.weights.tensor_files import FOLDER_INDEX

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
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
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
SIZES = {  # fields that are read, by class
    "UNet2DConditionModel": (
        "attention_head_dim",
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "in_channels",
        "layers_per_block",
        "out_channels",
        "projection_class_embeddings_input_dim",
        "sample_size",
        "transformer_layers_per_block",
        "up_block_types",
    ),
    "AutoencoderKL": (
        "block_out_channels",
        "down_block_types",
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "out_channels",
        "scaling_factor",
        "up_block_types",
    ),
    "CLIPTextModel": (
        "eos_token_id",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "projection_dim",
    ),
}
NO_EFFECT = {  # fields that change nothing here, by class, and why
    "UNet2DConditionModel": {
        "addition_embed_type_num_heads": "of the addition_embed_type text",
        "dropout": "of training",
        "upcast_attention": "of a half's rounding",
    },
    "AutoencoderKL": {"force_upcast": "the VAE runs in float32", "sample_size": "of diffusers' tiles"},
    "CLIPTextModel": {
        "architectures": "a name",
        "attention_dropout": "of training",
        "bos_token_id": "the tokenizer's own is used",
        "chunk_size_feed_forward": "of memory",
        "dropout": "of training",
        "dtype": "the dtype is asked for",
        "id2label": "of classifiers",
        "initializer_factor": "of training",
        "initializer_range": "of training",
        "is_encoder_decoder": "of other models",
        "label2id": "of classifiers",
        "output_attentions": "of what is returned",
        "output_hidden_states": "of what is returned",
        "pad_token_id": "the tokenizer's own is used",
        "problem_type": "of classifiers",
        "return_dict": "of Python",
        "torch_dtype": "the dtype is asked for",
        "transformers_version": "a name",
    },
}
END_OF_TEXT = (2, 49407)  # as old and new files name it; 2 means the largest id to transformers: the same token
INDEX = (  # of `model_index.json`, besides the networks'
    "feature_extractor",  # this and the image encoder work for IP-Adapters alone
    "force_zeros_for_empty_prompt",
    "image_encoder",
    "requires_aesthetics_score",
    "scheduler",
    "tokenizer",
    "tokenizer_2",
)
TOKENIZERS = (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"])
KNOWN_TOKENS = {"<|startoftext|>", "<|endoftext|>", "!"}
PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
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
    check_index(folder, index)
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


def check_index(folder: Path, index: Json) -> None:
    """InputError for what a pipeline of this folder would have that is not here: other parts, another tokenizer."""
    path = folder / FOLDER_INDEX
    kind = index.get("_class_name") or "StableDiffusionXLPipeline"
    if not str(kind).startswith("StableDiffusionXL") or "Pix2Pix" in str(kind):
        raise InputError(f"{path}: expected a pipeline of SDXL as StableDiffusionXLPipeline, found {kind!r:.60}")
    for name, value in index.items():
        is_known = name in CLASSES or name in INDEX or name.startswith("_")
        if not is_known and value not in (None, False, [None, None]):
            raise InputError(f"{path}: {name} {value!r} is not understood: this opens SDXL's base and refiner alone")
    is_refiner = index.get("text_encoder") in (None, [None, None])
    scored = index.get("requires_aesthetics_score", is_refiner)
    if scored != is_refiner:
        kind = "refiner has" if is_refiner else "base has no"
        raise InputError(f"{path}: requires_aesthetics_score is {scored}, but an SDXL {kind} aesthetic score")
    for name, token in PADDING.items():
        if index.get(name) in (None, [None, None]):
            continue
        if index[name] not in TOKENIZERS:
            raise InputError(f"{path}: expected {name} of CLIP's, found {index[name]}")
        settings = folder / name / "tokenizer_config.json"
        fields = read_json(settings) if settings.is_file() else {}
        found = fields.get("pad_token", token)
        found = found.get("content") if isinstance(found, dict) else found
        if found != token:
            raise InputError(f"{settings}: expected the pad_token {token!r}, found {found!r}")
        if fields.get("model_max_length", 77) != 77:
            raise InputError(f"{settings}: expected model_max_length 77, found {fields['model_max_length']!r}")
        added = folder / name / "added_tokens.json"
        if more := sorted(set(read_json(added) if added.is_file() else ()) - KNOWN_TOKENS):
            raise InputError(f"{added}: expected no tokens beyond CLIP's, found {', '.join(more[:4])}: remove the file")


def require(path: Path, fields: Json, expected: Json, name: str) -> None:
    """InputError where a field of a class has another value than expected, or is unknown.

    One that is absent, or null for false, agrees.
    """
    for key, value in expected.items():
        if (fields.get(key, value) or None) != (value or None):
            raise InputError(f"{path} is not SDXL's: expected {key} {value!r}, found {fields[key]!r}")
    for key, value in fields.items():
        is_known = key in expected or key in SIZES[name] or key in NO_EFFECT[name] or key.startswith("_")
        if not is_known and value not in (None, False, [], {}, ""):
            raise InputError(f"{path}: the field {key} {value!r:.60} is not understood")


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
    require(path, c | {"attention_head_dim": heads}, expected, "UNet2DConditionModel")
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
    require(path, c, VAE | kinds, "AutoencoderKL")
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
    require(path, c, TEXT | {"intermediate_size": 4 * c["hidden_size"]}, "CLIPTextModel")
    if c.get("eos_token_id", END_OF_TEXT[0]) not in END_OF_TEXT:
        raise InputError(f"{path} is not SDXL's: expected eos_token_id 2 or 49407, found {c['eos_token_id']!r}")
    return TextEncoderConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        layers=c["num_hidden_layers"],
        embed_dim=c["projection_dim"],
        activation=c["hidden_act"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
    )
