"""The names of one tensor in the layouts of other tools, generated from a configuration, both ways.

The official names (those of our modules) are one side of every rule. The other side is diffusers' for the UNet and
the VAE and transformers' for the text towers. open_clip's own names for the bigG tower are the official ones.
This is the only table of names in the project.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from sdxl_ref.config import InputError, ModelConfig, UNetConfig, VAEConfig
from sdxl_ref.weights.checkpoint import build_empty

Part = Literal["unet", "vae", "clip_l", "openclip_g"]
PARTS: dict[str, Part] = {"unet": "unet", "vae": "vae", "text_encoder": "clip_l", "text_encoder_2": "openclip_g"}


@dataclass(frozen=True)
class Rule:
    """One official tensor and what it is called elsewhere: one name, or three where q, k and v stand stacked.

    Without any name the tensor has no place there. kind: "same"; "transpose" (a matrix applied from the other side);
    "pointwise" (a 1x1 convolution that is a linear layer there, so its last two axes fall away).
    """

    official: str
    other: tuple[str, ...]
    kind: Literal["same", "transpose", "pointwise"] = "same"

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The official tensor -> the other layout's tensors, in the order of `other`."""
        if self.kind == "transpose":
            return [tensor.T]
        if self.kind == "pointwise":
            return [tensor[:, :, 0, 0]]
        if len(self.other) < 2:
            return [tensor] * len(self.other)
        return list(tensor.chunk(len(self.other)))

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if self.kind == "transpose":
            return tensors[0].T
        if self.kind == "pointwise":  # old diffusers files kept the convolution
            return tensors[0][:, :, None, None] if tensors[0].ndim == 2 else tensors[0]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def rules(part: Part, keys: Iterable[str], config: UNetConfig | VAEConfig | None = None) -> list[Rule]:
    """One rule for each official key of a network (its `state_dict` names, without the checkpoint's prefix)."""
    if part == "unet":
        assert isinstance(config, UNetConfig)
        name = renamer(unet_modules(config))
    elif part == "vae":
        assert isinstance(config, VAEConfig)
        name = renamer(vae_modules(config))
        return [Rule(key, (name(key),), _vae_kind(key)) for key in keys]
    elif part == "clip_l":
        name = str
    else:
        return [_openclip_rule(key) for key in keys]
    return [Rule(key, (name(key),)) for key in keys]


@lru_cache(maxsize=16)
def part_rules(part: str, config: ModelConfig) -> tuple[Mapping[str, Tensor], Sequence[Rule]]:
    """The state of a part by official name, on the meta device, and the rule of each of its tensors."""
    network = build_empty(part, config)
    state = network.state_dict()
    return MappingProxyType(state), tuple(rules(PARTS[part], state, getattr(network, "config", None)))


def to_other(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> the other layout; a tensor without a place there (`logit_scale`) stays behind."""
    return {k: t.contiguous() for r in rules for k, t in zip(r.other, r.split(state[r.official]), strict=True)}


def to_official(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_other`; a KeyError names a tensor that is missing."""
    return {r.official: r.join([state[k] for k in r.other]) for r in rules if r.other}


def renamer(modules: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces the longest module path of `modules` that begins a key; InputError where none does."""

    def rename(key: str) -> str:
        path = key
        while path not in modules:
            path, dot, _ = path.rpartition(".")
            if not dot:
                raise InputError(f"no module of this configuration has a tensor {key!r}")
        return modules[path] + key[len(path) :]

    return rename


RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Official module paths -> diffusers' `UNet2DConditionModel`. Below a transformer the names agree."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    levels = len(config.channel_mult)
    blocks = config.num_res_blocks
    residual = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level in range(levels):
        down = f"down_blocks.{level}"
        up = f"up_blocks.{levels - 1 - level}"
        first_in = 1 + level * (blocks + 1)
        first_out = (levels - 1 - level) * (blocks + 1)
        has_attention = config.has_attention(level)
        for side, first, count, name in (("input", first_in, blocks, down), ("output", first_out, blocks + 1, up)):
            for i in range(count):
                residual[f"{side}_blocks.{first + i}.0"] = f"{name}.resnets.{i}"
                if has_attention:
                    modules[f"{side}_blocks.{first + i}.1"] = f"{name}.attentions.{i}"
        if level < levels - 1:
            modules[f"input_blocks.{first_in + blocks}.0.op"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            upsample = 2 if has_attention else 1  # its place behind the ResBlock
            modules[f"output_blocks.{first_out + blocks}.{upsample}.conv"] = f"{up}.upsamplers.0.conv"
    return modules | {f"{a}.{x}": f"{b}.{y}" for a, b in residual.items() for x, y in RES_BLOCK.items()}


ENCODER_BLOCK = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.*)")  # of diffusers' `AutoencoderKL`
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """Official module paths -> diffusers' `AutoencoderKL`, whose decoder counts its levels from the other end."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels = len(config.ch_mult)
    for side in ("encoder", "decoder"):
        for name, other in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out")):
            modules[f"{side}.{name}"] = f"{side}.{other}"
        for name, other in VAE_ATTENTION.items():
            modules[f"{side}.mid.attn_1.{name}"] = f"{side}.mid_block.attentions.0.{other}"
        residual = {f"{side}.mid.block_{i + 1}": f"{side}.mid_block.resnets.{i}" for i in range(2)}
        for level in range(levels):
            if side == "encoder":
                ours = f"encoder.down.{level}"
                theirs = f"encoder.down_blocks.{level}"
                modules[f"{ours}.downsample.conv"] = f"{theirs}.downsamplers.0.conv"
                blocks = config.num_res_blocks
            else:
                ours = f"decoder.up.{level}"
                theirs = f"decoder.up_blocks.{levels - 1 - level}"
                modules[f"{ours}.upsample.conv"] = f"{theirs}.upsamplers.0.conv"
                blocks = config.num_res_blocks + 1
            residual |= {f"{ours}.block.{i}": f"{theirs}.resnets.{i}" for i in range(blocks)}
        for ours, theirs in residual.items():
            modules |= {ours: theirs, f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut"}
    return modules


def vae_to_official(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of an autoencoder of any size; those of the encoder's residual blocks by their official names."""
    official = {}
    for name, shape in shapes.items():
        found = ENCODER_BLOCK.fullmatch(name)
        official["encoder.down.{}.block.{}.{}".format(*found.groups()) if found else name] = shape
    return official


def _vae_kind(key: str) -> Literal["same", "pointwise"]:
    projection = any(f"mid.attn_1.{name}.weight" in key for name in ("q", "k", "v", "proj_out"))
    return "pointwise" if projection else "same"


OPENCLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _openclip_rule(key: str) -> Rule:
    """Official (open_clip) -> transformers' `CLIPTextModelWithProjection`."""
    whole = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    if key in whole:
        return Rule(key, (whole[key],))
    if key == "text_projection":
        return Rule(key, ("text_projection.weight",), "transpose")
    if key == "logit_scale":
        return Rule(key, ())
    _, _, index, name = key.split(".", 3)  # transformer.resblocks.N.…
    layer = f"text_model.encoder.layers.{index}"
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return Rule(key, tuple(f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"))
    return Rule(key, (f"{layer}.{renamer(OPENCLIP_BLOCK)(name)}",))
