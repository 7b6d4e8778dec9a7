"""Sizes of SDXL's networks as frozen dataclasses, and the one error type for bad input.

The field names are those of the official configuration files (Stability-AI/generative-models,
`configs/inference/sd_xl_refiner.yaml` and `sd_xl_base.yaml`). This module imports nothing of the package.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PREDICTIONS = ("epsilon", "v")
NO_SIZES = ("activation", "scale_factor")
CONTROLS = dict.fromkeys([*range(32), *range(127, 160), 0x2028, 0x2029], " ")  # characters that no line shows


class InputError(ValueError):
    """Bad input from the user: the message says what was expected, what was found and what to do.

    It is one line of at most 1500 characters, whatever it quotes.
    """

    def __str__(self) -> str:
        text = super().__str__().translate(CONTROLS)
        return text if len(text) <= 1500 else f"{text[:1297]} … {text[-200:]}"


def nearest(word: object, words: Iterable[str]) -> str:
    """A hint at the closest match for a misspelt word; empty where nothing is close."""
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def unknown(what: str, word: object, words: Iterable[str]) -> str:
    """The message for a word that is none of those known, with the nearest one."""
    known = list(words)
    return f"unknown {what} {word!r}{nearest(word, known) or ':'} expected one of {', '.join(known)}"


def check_sizes(config: object) -> None:
    """InputError unless every field that is a size, or several, holds whole numbers that a network can have."""
    for name, value in vars(config).items():
        if name in NO_SIZES:
            continue
        least = 0 if name == "transformer_depth" else 1  # a level without attention has none
        sizes = value if isinstance(value, tuple | list) else [value]
        if not all(type(size) is int and least <= size <= 10**6 for size in sizes):
            raise InputError(f"{name} must be whole numbers from {least} to a million, found {value!r:.60}")


@dataclass(frozen=True)
class UNetConfig:
    """The denoising UNet. Channels are multiples of 32 (GroupNorm has 32 groups everywhere)."""

    in_channels: int
    out_channels: int
    model_channels: int  # width of the first level
    num_res_blocks: int  # per level on the way down; one more on the way up
    channel_mult: tuple[int, ...]  # width of each level, in units of model_channels
    attention_resolutions: tuple[int, ...]  # downsampling factors of the levels that have attention
    num_head_channels: int
    transformer_depth: int | tuple[int, ...]  # transformer blocks per attention: one number, or one per level
    context_dim: int  # width of the text context
    adm_in_channels: int  # width of the vector `y`

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.model_channels % 32 or self.channel_mult[:1] != (1,):
            found = f"{self.model_channels}, {self.channel_mult}"
            raise InputError(f"expected model_channels a multiple of 32, channel_mult from 1 on, found {found}")
        if len(self.depths) != len(self.channel_mult):
            raise InputError(f"transformer_depth must be a number or one per level, found {self.transformer_depth}")
        widths = [self.model_channels * m for level, m in enumerate(self.channel_mult) if self.has_attention(level)]
        widths.append(self.model_channels * self.channel_mult[-1])  # the middle block always has attention
        if any(width % self.num_head_channels for width in widths):
            raise InputError(f"num_head_channels {self.num_head_channels} must divide the attention widths {widths}")

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks per attention, one number per level; the last one is the middle block's too."""
        if isinstance(self.transformer_depth, int):
            return (self.transformer_depth,) * len(self.channel_mult)
        return tuple(self.transformer_depth)

    def has_attention(self, level: int) -> bool:
        return 2**level in self.attention_resolutions


@dataclass(frozen=True)
class TextEncoderConfig:
    """A CLIP text tower; `embed_dim` is the width of the pooled vector."""

    width: int
    heads: int
    layers: int
    embed_dim: int
    activation: str = "gelu"  # or "quick_gelu"
    vocab_size: int = 49408
    context_length: int = 77

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.width % self.heads:
            raise InputError(f"heads must divide the width {self.width}, found {self.heads}")


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder; latents are multiplied by `scale_factor` after encoding (by the pipelines, not inside)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.13025

    def __post_init__(self) -> None:
        check_sizes(self)
        is_number = type(self.scale_factor) in (int, float)
        if self.ch % 32 or not is_number or not 0 < self.scale_factor < 10**6:
            raise InputError(f"expected ch % 32 == 0 and a scale_factor above 0, found {self.ch}, {self.scale_factor}")


@dataclass(frozen=True)
class Defaults:
    """How a model is run where a request leaves it open: SDXL's own way, or what the settings in a folder say."""

    sampler: str = "euler"
    spacing: Any = "leading"  # a name, or an object that makes the grids: see `NoiseSchedule.grid`
    karras: bool = False
    zeros: bool | None = None  # whether no negative prompt means zeros, or the empty prompt; None: zeros on a base
    refusal: str = ""  # why the model's own sampler cannot be had


SDXL = Defaults()


@dataclass(frozen=True)
class ModelConfig:
    """Everything in one checkpoint. `text_encoders` stand in the order of `conditioner.embedders.N`.

    One text encoder (OpenCLIP) makes a refiner; two (CLIP-L, then OpenCLIP) make a base.
    """

    unet: UNetConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    vae: VAEConfig
    resolution: int = 1024  # pixels a side of the pictures it was trained on
    prediction: str = "epsilon"  # what the UNet returns: the noise, or "v"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(unknown("prediction", self.prediction, PREDICTIONS))
        if type(self.resolution) is not int or self.resolution % 8 or not 8 <= self.resolution <= 10**4:
            raise InputError(f"resolution must be a multiple of 8 up to 10000, found {self.resolution!r:.60}")

    @property
    def kind(self) -> str:
        return "refiner" if len(self.text_encoders) == 1 else "base"


CLIP_L = TextEncoderConfig(width=768, heads=12, layers=12, embed_dim=768, activation="quick_gelu")
OPENCLIP_BIGG = TextEncoderConfig(width=1280, heads=20, layers=32, embed_dim=1280)

REFINER_1_0 = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=384,
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2),
        num_head_channels=64,
        transformer_depth=4,
        context_dim=1280,
        adm_in_channels=2560,  # 1280 pooled + 5 numbers x 256
    ),
    text_encoders=(OPENCLIP_BIGG,),
    vae=VAEConfig(),
)

BASE_1_0 = ModelConfig(
    unet=dataclasses.replace(
        REFINER_1_0.unet,
        model_channels=320,
        channel_mult=(1, 2, 4),
        transformer_depth=(1, 2, 10),
        context_dim=2048,  # 768 of CLIP-L + 1280 of bigG
        adm_in_channels=2816,  # 1280 pooled + 6 numbers x 256
    ),
    text_encoders=(CLIP_L, OPENCLIP_BIGG),
    vae=VAEConfig(),
)
