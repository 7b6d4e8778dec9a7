"""A file or folder that holds one part of a model alone, in either layout: a UNet, an autoencoder or a text encoder.

Other tools keep parts apart: `sdxl_vae.safetensors`, a pruned UNet, a fine-tuned text encoder, the subfolders of a
folder in diffusers' layout. A part is told by its names, its sizes by its `config.json`, its metadata or its shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.weights import folder_config, identify
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.folder import EXTRAS_FILE, STEMS, Folder, Source, Stored, name_in_file, part_tensors, stored_in
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.layouts import Rule, part_rules, vae_to_official
from sdxl_ref.weights.names import find_file
from sdxl_ref.weights.stated_config import config_from_json
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, read_metadata

PART_CONFIG = "config.json"  # of a part's folder in diffusers' layout
PREFIX_KEY = "sdxl_ref.prefix"  # in the metadata of a part in diffusers' layout: what stood before its official names
NAMES = {
    "unet": "UNet",
    "vae": "autoencoder",
    "text_encoder": "CLIP-L text encoder",
    "text_encoder_2": "OpenCLIP bigG text encoder",
}
EXTRAS = re.compile(r"(.*\.)?(position_ids|attn_mask|logit_scale)|model_ema\..*|loss\..*")  # behind the part's prefix
PICTURE_TOWER = re.compile(r"(visual|vision_model|visual_projection)\..*")  # of a whole CLIP, which no SDXL model has


class Mark(NamedTuple):
    """A tensor that tells a part, and whose name it has."""

    part: str
    layout: str
    name: str


MARKS = (
    Mark("unet", "official", "output_blocks.0.0.in_layers.0.weight"),
    Mark("unet", "diffusers", "up_blocks.0.resnets.0.norm1.weight"),
    Mark("vae", "official", "decoder.mid.block_1.norm1.weight"),
    Mark("vae", "diffusers", "decoder.mid_block.resnets.0.norm1.weight"),
    Mark("text_encoder_2", "official", "transformer.resblocks.0.attn.in_proj_weight"),
    Mark("text_encoder", "diffusers", "text_model.encoder.layers.0.mlp.fc1.weight"),
)
SHORT_TEXT = "encoder.layers.0.mlp.fc1.weight"  # as transformers 5 writes it, without any prefix
LAYOUT_FILE = re.compile(  # of weights in diffusers' layout, of any variant, sharded or not
    rf"({'|'.join(STEMS)})(\.[^.]+)?(-\d+-of-\d+)?\.safetensors(\.index(\..+)?\.json)?"
)
OTHERS = ("encoder.", "decoder.", "visual.", "controlnet.")  # what may stand before a mark that is not the part's


@dataclass(frozen=True)
class LonePart:
    """A part by its name in a pipeline, where it lies, and all tensors of its files by the names that they have there.

    `prefix` stands before the names of the part's own.
    """

    path: Path
    part: str
    layout: str
    prefix: str
    stored: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"an SDXL {NAMES[self.part]} (by its keys)"

    @property
    def official_prefix(self) -> str:
        """What stands before its official names, or stood there before it was converted."""
        return self.prefix if self.layout == "official" else self.metadata.get(PREFIX_KEY, self.prefix)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Of the `config.json` beside it, where it lies in diffusers' layout; empty where it does not."""
        path = self.files[0].parent / PART_CONFIG
        is_beside = path.is_file() and LAYOUT_FILE.fullmatch(self.files[0].name)
        return read_json(path) if is_beside else {}

    @property
    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self.stored.values()})


def find_lone_part(path: Path, variant: str | None = None) -> LonePart | None:
    """The part that a file, or a folder of one, holds alone; None where it holds several or none.

    InputError for a file that cannot be read.
    """
    if (path / FOLDER_INDEX).is_file():
        return None
    stored = tensors_at(path, variant)
    found = parts_of(stored)
    if len(found) != 1:
        return None
    [(part, (layout, prefix))] = found.items()
    return LonePart(path, part, layout, prefix, stored, read_metadata(next(iter(stored.values())).path))


def find_part(path: Path, part: str) -> LonePart | None:
    """One part of a file or folder, whatever else it holds. InputError as `find_lone_part` raises it."""
    stored = tensors_at(path)
    if part not in (found := parts_of(stored)):
        return None
    layout, prefix = found[part]
    if len(found) > 1:
        stored = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return LonePart(path, part, layout, prefix, stored, read_metadata(next(iter(stored.values())).path))


def tensors_at(path: Path, variant: str | None = None) -> dict[str, Stored]:
    """All tensors of a file, or of a folder in the layout that a part has in diffusers', with our extras."""
    if not path.is_dir() or not any(LAYOUT_FILE.fullmatch(file.name) for file in path.iterdir()):
        return stored_in(find_file(path))
    stored = part_tensors(path, variant)
    extras = path / EXTRAS_FILE
    return stored | (stored_in(extras) if extras.is_file() else {})


def parts_of(stored: Mapping[str, Stored]) -> dict[str, tuple[str, str]]:
    """The parts that these tensors make: the layout of each, and what stands before its names."""
    found = {}
    for mark in MARKS:
        prefix = prefix_of(mark.name, stored)
        if prefix is not None:
            found[mark.part] = (mark.layout, prefix)
    if not found and SHORT_TEXT in stored and "embeddings.token_embedding.weight" in stored:
        found["text_encoder"] = ("diffusers", "")
    if "text_encoder" in found and "text_encoder_2" not in found and has_projection(stored, found["text_encoder"][1]):
        found["text_encoder_2"] = found.pop("text_encoder")
    return found


def prefix_of(mark: str, names: Mapping[str, Stored]) -> str | None:
    """What stands before a part's names, by one of them; None where that is not there."""
    if mark in names:
        return ""
    before = (name.removesuffix(mark) for name in names if name.endswith(f".{mark}"))
    return next((prefix for prefix in before if not prefix.endswith(OTHERS)), None)


def has_projection(stored: Mapping[str, Stored], prefix: str) -> bool:
    """Whether a text encoder in transformers' names is the second one: it has a projection, and is not CLIP-L wide."""
    projection = stored.get(f"{prefix}text_projection.weight")
    return projection is not None and projection.header.shape[1] != BASE_1_0.text_encoders[0].width


# --- its tensors ----------------------------------------------------------------------------------------------------


def open_part(lone: LonePart, config: ModelConfig | None = None) -> Folder:
    """The part as a checkpoint whose keys are the official ones without a prefix, extras under the names they have.

    `config` is of the model that it has to fit, where that is known. InputError where tensors are missing, of another
    shape, or of no part.
    """
    note = ""
    if config is None:
        config, note = model_around(lone)
    state, rules = part_rules(lone.part, config)
    sources: dict[str, Source] = {}
    left = dict(lone.stored)
    for rule in rules:
        names = names_of(rule, lone)
        if names and all(name in left for name in names):
            tensors = [left.pop(name) for name in names]
            sources[rule.official] = Source(rule_of(rule, lone, tensors), tensors)
    strange = [name for name in left if not EXTRAS.fullmatch(name) and not PICTURE_TOWER.fullmatch(name)]
    missing = [key for key in state if key not in sources and key != "logit_scale"]
    misshapen = [key for key, source in sources.items() if source.shape != tuple(state[key].shape)]
    problems = (("missing", missing), ("unexpected", strange), ("of another shape", misshapen))
    if found := [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems if keys]:
        raise InputError(f"{lone.path} looks like {lone.name}, but its tensors do not fit: {'; '.join(found)}")
    sources |= {name: Source(None, [tensor]) for name, tensor in left.items() if not PICTURE_TOWER.fullmatch(name)}
    shapes = {key: source.shape for key, source in sources.items()}
    return Folder(lone.path, config, shapes, lone.metadata, note, sources=sources)


def names_of(rule: Rule, lone: LonePart) -> list[str]:
    """The names that an official tensor of the part has in the file; none for `logit_scale` in diffusers' layout."""
    if lone.layout == "official":
        return [lone.prefix + rule.official]
    return [name_in_file(lone.prefix + name, lone.stored) for name in rule.other]


def rule_of(rule: Rule, lone: LonePart, tensors: list[Stored]) -> Rule | None:
    """What makes the official tensor of those in the file; some tools store the VAE's attention as matrices."""
    if lone.layout == "diffusers":
        return rule
    is_matrix = rule.kind == "pointwise" and len(tensors[0].header.shape) == 2
    return rule if is_matrix else None


# --- its sizes ------------------------------------------------------------------------------------------------------


def model_around(lone: LonePart) -> tuple[ModelConfig, str]:
    """A model that has this part, with a note on what was assumed; its other parts fit, and are of no account."""
    fields = lone.fields
    said = config_from_json(lone.metadata[CONFIG_KEY]) if CONFIG_KEY in lone.metadata else None
    if said is not None and not fields:
        return said, ""
    path = lone.files[0].parent / PART_CONFIG
    shapes = {name.removeprefix(lone.prefix): stored.header.shape for name, stored in lone.stored.items()}
    try:
        read = folder_config.part_config(lone.part, path, fields) if fields else None
        if lone.part == "unet":
            unet = read or identify.unet_config(official_unet(shapes))
            model = around_unet(unet, said)
        elif lone.part == "vae":
            vae = read or identify.vae_config(vae_to_official(shapes))
            model = replace(said or REFINER_1_0, vae=vae)
        else:
            shapes = official_text(shapes, lone.part)
            tower = read or identify.text_config(shapes)
            model = around_text_encoder(lone.part, tower, said)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{lone.path} looks like {lone.name}, but its sizes do not tell: {error}") from error
    return model, "" if fields else assumed(lone.part, model)


def assumed(part: str, model: ModelConfig) -> str:
    """What neither metadata nor shapes tell."""
    if part == "vae":
        return f"no {PART_CONFIG}: SDXL's scaling factor {model.vae.scale_factor} assumed"
    if model in (REFINER_1_0, BASE_1_0):
        return ""
    return f"no {PART_CONFIG}: sizes read from the shapes, {identify.HEAD} channels a head assumed"


def around_unet(unet: UNetConfig, said: ModelConfig | None) -> ModelConfig:
    """A model of this UNet: the one of its metadata, an official one, or one whose text encoder gives what it reads."""
    for model in (said, BASE_1_0, REFINER_1_0):
        if model is not None and canonical(unet) == canonical(model.unet):
            return model
    tower = TextEncoderConfig(unet.context_dim, 1, 1, unet.adm_in_channels - 5 * 256)
    return ModelConfig(unet, (tower,), VAEConfig())


def canonical(unet: UNetConfig) -> UNetConfig:
    """The same sizes in the one way of writing them."""
    resolutions = tuple(sorted(unet.attention_resolutions))
    last = len(unet.depths) - 1  # its depth is the middle block's too
    depths = tuple(n if level == last or unet.has_attention(level) else 1 for level, n in enumerate(unet.depths))
    return replace(unet, transformer_depth=depths, attention_resolutions=resolutions)


def around_text_encoder(part: str, tower: TextEncoderConfig, said: ModelConfig | None) -> ModelConfig:
    """A model of this text encoder: the one of its metadata, or one whose UNet reads what it gives."""
    index = 0 if part == "text_encoder" else -1
    if said is not None and said.text_encoders[index] == tower:
        return said
    if part == "text_encoder":
        second = BASE_1_0.text_encoders[1]
        unet = replace(BASE_1_0.unet, context_dim=tower.width + second.width)
        return replace(BASE_1_0, unet=unet, text_encoders=(tower, second))
    unet = replace(REFINER_1_0.unet, context_dim=tower.width, adm_in_channels=tower.embed_dim + 5 * 256)
    return replace(REFINER_1_0, unet=unet, text_encoders=(tower,))


def official_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a UNet under the official names of the tensors that tell its sizes."""
    if "conv_in.weight" not in shapes:
        return dict(shapes)
    official = {}
    blocks = len({name.split(".")[3] for name in shapes if name.startswith("down_blocks.0.resnets.")})
    whole = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "conv_out.weight": "out.2.weight",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
    }
    for name, shape in shapes.items():
        if name in whole:
            official[whole[name]] = shape
        elif name.startswith("mid_block.attentions.0."):
            official[name.replace("mid_block.attentions.0", "middle_block.1")] = shape
        elif name.startswith("down_blocks."):
            _, level, kind, index, rest = name.split(".", 4)
            place = 1 + int(level) * (blocks + 1)
            if kind == "downsamplers":
                official[f"input_blocks.{place + blocks}.0.op.{rest.removeprefix('conv.')}"] = shape
            elif kind == "attentions":
                official[f"input_blocks.{place + int(index)}.1.{rest}"] = shape
            elif rest == "conv2.weight":
                official[f"input_blocks.{place + int(index)}.0.out_layers.3.weight"] = shape
    return official


def official_text(shapes: Mapping[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a text encoder under the names that a checkpoint has behind `conditioner.embedders.N.`."""
    if part == "text_encoder":
        return {f"transformer.text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes.items()}
    if "token_embedding.weight" in shapes:
        return {f"model.{name}": shape for name, shape in shapes.items()}
    below = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    official = {
        "model.token_embedding.weight": below["embeddings.token_embedding.weight"],
        "model.positional_embedding": below["embeddings.position_embedding.weight"],
        "model.text_projection": below["text_projection.weight"][::-1],
    }
    layers = "encoder.layers."
    return official | {
        f"model.transformer.resblocks.{name.removeprefix(layers)}": shape
        for name, shape in below.items()
        if name.startswith(layers)
    }
