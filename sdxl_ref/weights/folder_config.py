"""The configuration files of a folder in diffusers' layout -> our configurations.

A field is a size of ours, or has to have SDXL's value, or has no effect on what is computed; one that is none of these
is refused. Source: the `config.json` of `UNet2DConditionModel`, `AutoencoderKL` (diffusers) and `CLIPTextConfig`
(transformers), and the constructors of the SDXL pipelines.
"""

from pathlib import Path
from types import NoneType
from typing import Any

from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.networks.layers import ACTIVATIONS
from sdxl_ref.weights.fitting import require_fit
from sdxl_ref.weights.folder_tokenizer import check_tokenizers
from sdxl_ref.weights.json_files import Json, read_json
from sdxl_ref.weights.stated_config import checked_depth
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
NUMBER = "a whole number above 0"
NUMBERS = "a list of whole numbers above 0"
EITHER = "a whole number above 0, or a list of them"
DEPTHS = "a whole number, or a list of them"
NAME = "a name"
NAMES = "a list of names"
FACTOR = "a finite number above 0"
SIZES = {  # fields that are read, by class, and what each has to be
    "UNet2DConditionModel": {
        "attention_head_dim": EITHER,
        "block_out_channels": NUMBERS,
        "cross_attention_dim": NUMBER,
        "down_block_types": NAMES,
        "in_channels": NUMBER,
        "layers_per_block": NUMBER,
        "out_channels": NUMBER,
        "projection_class_embeddings_input_dim": NUMBER,
        "sample_size": NUMBER,
        "transformer_layers_per_block": DEPTHS,
        "up_block_types": NAMES,
    },
    "AutoencoderKL": {
        "block_out_channels": NUMBERS,
        "down_block_types": NAMES,
        "in_channels": NUMBER,
        "latent_channels": NUMBER,
        "layers_per_block": NUMBER,
        "out_channels": NUMBER,
        "scaling_factor": FACTOR,
        "up_block_types": NAMES,
    },
    "CLIPTextModel": {
        "eos_token_id": NUMBER,
        "hidden_act": NAME,
        "hidden_size": NUMBER,
        "intermediate_size": NUMBER,
        "num_attention_heads": NUMBER,
        "num_hidden_layers": NUMBER,
        "projection_dim": NUMBER,
    },
}
MAY_LACK = {"sample_size", "up_block_types", "eos_token_id", "intermediate_size"}  # SDXL's is meant
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
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")


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
    built = {part: part_config(part, paths[part], configs[part]) for part in parts}
    encoders = tuple(built[part] for part in parts if part.startswith("text"))
    resolution = 8 * (configs["unet"].get("sample_size") or 128)
    try:
        config = checked_depth(ModelConfig(built["unet"], encoders, built["vae"], resolution))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    require_fit(config, folder)
    return config


def part_config(part: str, path: Path, fields: Json) -> Any:
    """The sizes of one part, from its `config.json`. InputError as `model_config` raises it."""
    build = {"unet": unet_config, "vae": vae_config}.get(part, text_config)
    check_none_left_out(path, fields)
    if fields.get("_class_name", CLASSES[part][1]) != CLASSES[part][1]:
        found = fields["_class_name"]
        raise InputError(f"{path} is not SDXL's: expected _class_name {CLASSES[part][1]!r}, found {found!r:.60}")
    require_kinds(path, fields, CLASSES[part][1].removesuffix("WithProjection"))
    try:
        return build(path, fields)
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def require_kinds(path: Path, fields: Json, name: str) -> None:
    """InputError where a field that is read is missing, or is of another kind than a class has it."""
    for key, kind in SIZES[name].items():
        if fields.get(key) is None and key in MAY_LACK:
            continue
        if not is_a(kind, fields.get(key)):
            found = f"found {fields[key]!r:.60}" if key in fields else "which is missing"
            raise InputError(f"{path} is not SDXL's: expected {key} to be {kind}, {found}")


def is_a(kind: str, value: Any) -> bool:
    """Whether a value of a configuration is of one of the kinds above."""
    if kind == FACTOR:
        return type(value) in (int, float) and 0 < value < 10**6
    if kind in (NAME, NAMES):
        return all(isinstance(one, str) for one in as_list(value)) and isinstance(value, list) == (kind == NAMES)
    is_right_form = {NUMBER: (int,), NUMBERS: (list,)}.get(kind, (int, list))
    least = 0 if kind == DEPTHS else 1
    return type(value) in is_right_form and all(type(one) is int and one >= least for one in as_list(value))


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as its one element; an empty list as one that holds nothing of use."""
    return (value or [None]) if isinstance(value, list) else [value]


def check_index(folder: Path, index: Json) -> None:
    """InputError for what a pipeline of this folder would have that is not here: other parts, another tokenizer."""
    path = folder / FOLDER_INDEX
    kind = index.get("_class_name") or "StableDiffusionXLPipeline"
    if not str(kind).startswith("StableDiffusionXL") or "Pix2Pix" in str(kind):
        raise InputError(f"{path}: expected a pipeline of SDXL as StableDiffusionXLPipeline, found {kind!r:.60}")
    for name, value in index.items():
        is_known = name in CLASSES or name in INDEX or name.startswith("_")
        if not is_known and value not in (None, False, [None, None]):
            raise InputError(
                f"{path}: {name} {value!r:.60} is not understood: this opens SDXL's base and refiner alone"
            )
    check_flags(path, index, "refiner" if index.get("text_encoder") in (None, [None, None]) else "base")
    scheduler = index.get("scheduler") or [None, None]
    if not isinstance(scheduler, list) or len(scheduler) != 2:
        raise InputError(f"{path}: expected the scheduler's library and class, found {scheduler!r:.60}")
    check_tokenizers(folder, index)


def check_flags(where: object, index: Json, kind: str) -> None:
    """InputError unless the two switches of a pipeline are true, false or left out, as this kind of model has them."""
    for name in FLAGS:
        if type(index.get(name)) not in (bool, NoneType):
            raise InputError(f"{where}: expected {name} true or false, found {index[name]!r:.60}")
    scored = index.get("requires_aesthetics_score")
    if scored not in (None, kind == "refiner"):
        has = "refiner has an" if kind == "refiner" else "base has no"
        raise InputError(f"{where}: requires_aesthetics_score is {scored}, but an SDXL {has} aesthetic score")


def require(path: Path, fields: Json, expected: Json, name: str) -> None:
    """InputError where a field of a class has another value than expected, or is unknown.

    One that is absent, or null for false, agrees.
    """
    for key, value in expected.items():
        if not is_same(fields.get(key, value), value):
            raise InputError(f"{path} is not SDXL's: expected {key} {value!r:.200}, found {fields[key]!r:.200}")
    for key, value in fields.items():
        is_known = key in expected or key in SIZES[name] or key in NO_EFFECT[name] or key.startswith("_")
        if not is_known and value not in (None, False, [], {}, ""):
            raise InputError(f"{path}: the field {key} {value!r:.60} is not understood")


def is_same(value: Any, needed: Any) -> bool:
    """Whether two values of a field are the same: null is false, and neither is 0 or an empty list."""
    value, needed = (False if one is None else one for one in (value, needed))
    return bool(value == needed) and isinstance(value, bool) == isinstance(needed, bool)


def check_none_left_out(where: object, fields: Json) -> None:
    """InputError where a configuration names fields of its own that diffusers does not read then."""
    if names := fields.get("_use_default_values"):
        raise InputError(
            f"{where}: _use_default_values {names!r:.60} is not done here: remove the fields that it names"
        )


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
    if c["hidden_act"] not in ACTIVATIONS:
        raise InputError(f"{path}: expected hidden_act {' or '.join(ACTIVATIONS)}, found {c['hidden_act']!r:.60}")
    return TextEncoderConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        layers=c["num_hidden_layers"],
        embed_dim=c["projection_dim"],
        activation=c["hidden_act"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
    )
