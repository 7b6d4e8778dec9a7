"""Open a folder in diffusers' layout: one subfolder a part, with its configuration and its weights, sharded or not.

Names and shapes are translated by `sdxl_ref.layouts` as tensors are read; nothing is converted beforehand. Source:
`DiffusionPipeline.from_pretrained` in diffusers, `PreTrainedModel.from_pretrained` in transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ref import layouts
from sdxl_ref.checkpoint import EXTRAS, PICKLES, Checkpoint, build_empty, check, prefixes, sha256_of
from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

INDEX = "model_index.json"
EXTRAS_FILE = "official_extras.safetensors"  # what an official file holds and this layout has no place for
STEMS = ("diffusion_pytorch_model", "model")
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


@dataclass(frozen=True)
class Folder(Checkpoint):
    """A checkpoint whose tensors lie in several files, under other names.

    `sources` has for each official key the files and names that it is made of, and the rule that makes it.
    """

    sources: Mapping[str, tuple[layouts.Rule | None, list[tuple[Path, str]]]] = None  # type: ignore[assignment]

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its official key; files stay mapped until the context ends."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def get(key: str) -> Tensor:
                rule, places = self.sources[key]
                found = []
                for path, name in places:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    found.append(opened[path].get_tensor(name))
                return found[0] if rule is None else rule.join(found).contiguous()

            yield get

    def sha256(self) -> str:
        """Of all the files of weights, one behind the other in the order of their names."""
        return sha256_of(*sorted({path for _, places in self.sources.values() for path, _ in places}))


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in any dtype that weights come in: torch cannot tell it of 8-bit ones."""
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def part_rules(part: str, config: ModelConfig) -> tuple[dict[str, Tensor], list[layouts.Rule]]:
    """The state of a part by official name, on the meta device, and the rule of each of its tensors."""
    network = build_empty(part, config)
    state = network.state_dict()
    return state, layouts.rules(layouts.PARTS[part], state, getattr(network, "config", None))


def find_file(path: Path) -> Path:
    """The one safetensors file of a folder; InputError for a pickle, or where there is no such file."""
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} is a pickle, which can run any code when opened: expected a safetensors file; if you trust it, "
            "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], OUT)"
        )
    if not os.path.isdir(path):
        raise InputError(f"no such checkpoint: {path}")
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise InputError(f"expected one .safetensors file in the folder {path}, found {names}: name the file")
    return found[0]


def open_folder(folder: Path, variant: str | None = None) -> Folder:
    """Open a folder with a `model_index.json`. `variant` picks files such as `model.fp16.safetensors`.

    InputError for another architecture, missing or damaged files, an index that points elsewhere, and as
    `open_checkpoint` raises it.
    """
    config = model_config(folder)
    sources: dict[str, tuple[layouts.Rule | None, list[tuple[Path, str]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, prefix in prefixes(config).items():
        _, rules = part_rules(part, config)
        names = tensors(folder / part, variant)
        for rule in rules:
            others = [names.pop(found_name(name, names), None) for name in rule.other]
            if others and None not in others:
                sources[prefix + rule.official] = rule, [(path, name) for path, name, _ in filter(None, others)]
                shapes[prefix + rule.official] = joined(rule, [shape for _, _, shape in filter(None, others)])
        left = [name for name in names if not name.endswith("position_ids")]
        shapes |= {f"{part}/{name}": () for name in left}  # reported as unexpected
    extras = folder / EXTRAS_FILE
    metadata: dict[str, str] = {}
    if extras.exists():
        scale = prefixes(config)["text_encoder_2"] + "logit_scale"
        for name, (path, _, shape) in headers(extras).items():
            if name != scale and not EXTRAS.fullmatch(name):
                raise InputError(f"{extras} holds {name}, expected what the parts have no place for: delete the file")
            sources[name], shapes[name] = (None, [(path, name)]), shape
        with safe_open(extras, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    check(config, shapes, folder)
    return Folder(folder, config, shapes, metadata, "", sources)


def found_name(name: str, names: Mapping[str, Any]) -> str:
    """`CLIPTextModel` is written without `text_model.` since transformers 5, and with it before."""
    return name if name in names else name.removeprefix("text_model.")


def joined(rule: layouts.Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that `rule.join` gives tensors of these shapes."""
    first = shapes[0]
    if rule.kind == "transpose":
        return first[::-1]
    if rule.kind == "pointwise":
        return (*first, 1, 1) if len(first) == 2 else first
    return (sum(shape[0] for shape in shapes), *first[1:]) if len(shapes) > 1 else first


def tensors(folder: Path, variant: str | None) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Every tensor of a part: where it lies, its name there, its shape."""
    middle = f".{variant}" if variant else ""
    single = [folder / f"{stem}{middle}.safetensors" for stem in STEMS]
    indices = [folder / f"{stem}.safetensors.index{middle}.json" for stem in STEMS]
    found = [path for path in (*single, *indices) if path.is_file()]
    if len(found) != 1:
        raise InputError(_no_single_file(folder, variant, found))
    if found[0].suffix == ".safetensors":
        return headers(found[0])
    return sharded(found[0])


def _no_single_file(folder: Path, variant: str | None, found: list[Path]) -> str:
    wanted = f"weights of variant {variant!r}" if variant else "weights"
    if found:
        return f"expected one file of {wanted} in {folder}, found {', '.join(path.name for path in found)}: remove one"
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = sorted({name.split(".")[1] for name in there if name.endswith(".safetensors") and name.count(".") > 1})
    hint = (
        f"there is the variant {variants[0].split('-')[0]!r}: name it"
        if variants and not variant
        else "complete the folder"
    )
    if any(name.endswith(PICKLES) for name in there):
        hint = "pickles are not opened: get the safetensors files"
    return f"expected {wanted} as safetensors in {folder}, found {', '.join(there[:4]) or 'nothing'}: {hint}"


def sharded(index: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """The tensors of an index, each in the shard that it names, which has to lie beside it."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{index}: expected a weight_map from tensors to shards, found none")
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for shard in sorted(set(map(str, weights.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {shard!r}: expected a safetensors file in the same folder")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} names the shard {shard}, which is not there: complete the folder")
        found |= headers(index.parent / shard)
    absent = [name for name in weights if name not in found or found[name][0].name != weights[name]]
    if absent:
        raise InputError(f"{index} names {len(absent)} tensors that its shards do not hold: {', '.join(absent[:3])}")
    return found


def headers(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: (path, key, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {path}: {error}") from error


def read_json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(found).__name__}")
    return found


def model_config(folder: Path) -> ModelConfig:
    """The sizes of all parts, from their `config.json`. InputError where a field means another architecture."""
    index = read_json(folder / INDEX)
    parts = [part for part in CLASSES if part != "text_encoder" or index.get(part) not in (None, [None, None])]
    for part in parts:
        if index.get(part) != CLASSES[part]:
            found = f"expected {part} {CLASSES[part]}, found {index.get(part)}"
            raise InputError(f"{folder / INDEX} is no SDXL pipeline: {found}")
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        agree(scheduler, read_json(scheduler), SCHEDULER)
    paths = {part: folder / part / "config.json" for part in parts}
    configs = {part: read_json(path) for part, path in paths.items()}
    try:
        unet = unet_config(paths["unet"], configs["unet"])
        vae = vae_config(paths["vae"], configs["vae"])
        encoders = tuple(text_config(paths[part], configs[part]) for part in parts if part.startswith("text"))
        return ModelConfig(unet, encoders, vae, 8 * int(configs["unet"].get("sample_size", 128)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{folder}: a config.json lacks or garbles a field of an SDXL model ({error!r})") from error


def agree(path: Path, found: Json, expected: Json) -> None:
    """InputError where a field says something else than expected; one that is not there, or null for no, does not."""
    for key, value in expected.items():
        if (found.get(key, value) or None) != (value or None):
            raise InputError(f"{path} is not SDXL's: expected {key} {value!r}, found {found[key]!r}")


def unet_config(path: Path, c: Json) -> UNetConfig:
    """diffusers' `UNet2DConditionModel` -> ours."""
    widths, heads = c["block_out_channels"], c["attention_head_dim"]  # which means the number of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    channels = widths[-1] // heads[-1]
    crossed = [kind.startswith("CrossAttn") for kind in c["down_block_types"]]
    kinds = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed]
    expected = UNET | {"attention_head_dim": [width // channels for width in widths], "down_block_types": kinds}
    expected["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    agree(path, c | {"attention_head_dim": heads}, expected)
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
    agree(path, c, VAE | kinds)
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
    agree(path, c, TEXT | {"intermediate_size": 4 * c["hidden_size"]})
    return TextEncoderConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        layers=c["num_hidden_layers"],
        embed_dim=c["projection_dim"],
        activation=c["hidden_act"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
    )
