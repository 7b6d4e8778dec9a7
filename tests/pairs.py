"""Our pipelines and diffusers', on the same seeded weights: tiny models, since the runs are what is compared.

A kind is "refiner" or "base", or "small refiner" or "small base", with SDXL's structure level by level.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from torch import nn

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline, pack
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.parity.live import assembled
from sdxl_ref.weights.checkpoint import prefixes

REFINER = peers.TINY_REFINER
BASE = peers.TINY_BASE
CONFIGS = {"refiner": REFINER, "base": BASE, "small refiner": peers.SMALL_REFINER, "small base": peers.SMALL_BASE}
SEEDS = {  # of the weights; both have the same VAE
    "refiner": {"unet": 1, "vae": 2, "text_encoder_2": 3},
    "base": {"unet": 4, "vae": 2, "text_encoder": 5, "text_encoder_2": 6},
}
PACKED = False  # True by `pytest --packed`: ours work packed wherever a CPU can
SMALL = {"height": 64, "width": 64, "num_inference_steps": 10, "output_type": "latent"}  # of text-to-image


# --- ours ---------------------------------------------------------------------------------------------------------


@lru_cache
def networks(kind: str) -> dict[str, Any]:
    """The networks of a model, shared by all tests: one that changes weights takes `own_networks`."""
    return own_networks(kind)


def own_networks(kind: str) -> dict[str, Any]:
    config = CONFIGS[kind]
    seeds = SEEDS[config.kind]
    return {part: peers.network(part, config, seeds[part]) for part in prefixes(config)}


@lru_cache
def packed_networks(kind: str) -> dict[str, Any]:
    return {part: pack(network) for part, network in networks(kind).items()}


def shared(kind: str) -> dict[str, Any]:
    """As a pipeline of ours has them: packed in a run with `--packed`."""
    return packed_networks(kind) if PACKED else networks(kind)


def refiner(kind: str = "refiner") -> ImageToImagePipeline:
    return ImageToImagePipeline(CONFIGS[kind], **shared(kind))


def base(kind: str = "base") -> TextToImagePipeline:
    return TextToImagePipeline(CONFIGS[kind], **shared(kind))


def ensemble() -> EnsemblePipeline:
    return EnsemblePipeline(base(), refiner())


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [seeded(number) for number in numbers]


def picture() -> Image.Image:
    return Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")).resize((128, 96))


def request(**changes: Any) -> dict[str, Any]:
    """Arguments that both image-to-image pipelines take; the sizes are no whole numbers of bfloat16."""
    arguments: dict[str, Any] = {
        "prompt": "a cup of coffee on a table, morning light",
        "negative_prompt": "blurry",
        "image": picture(),
        "strength": 0.5,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "original_size": (1001, 777),
        "crops_coords_top_left": (3, 515),
        "negative_original_size": (333, 611),
        "output_type": "latent",
    }
    return arguments | changes


def text_request(**changes: Any) -> dict[str, Any]:
    """Arguments that both text-to-image pipelines take."""
    arguments: dict[str, Any] = {
        "prompt": "a cup of coffee on a table, morning light",
        "height": 96,
        "width": 128,
        "num_inference_steps": 10,
        "original_size": (1001, 777),
        "crops_coords_top_left": (3, 515),
        "target_size": (515, 1023),
        "output_type": "latent",
    }
    return arguments | changes


# --- diffusers' ---------------------------------------------------------------------------------------------------


@lru_cache
def tokenizer(pad: str = "!") -> Any:
    with TemporaryDirectory() as folder:
        return peers.clip_tokenizer(Path(folder), pad=pad)


@lru_cache
def diffusers_parts(kind: str) -> dict[str, nn.Module]:
    """diffusers' and transformers' networks, of the weights of `networks`; no pipeline changes them."""
    ours = networks(kind)
    parts = {
        "unet": peers.diffusers_unet(ours["unet"]),
        "vae": peers.diffusers_vae(ours["vae"]),
        "text_encoder_2": peers.transformers_openclip(ours["text_encoder_2"]),
        "text_encoder": None,
    }
    if CONFIGS[kind].kind == "base":
        parts["text_encoder"] = peers.transformers_clip(ours["text_encoder"])
    return parts


def diffusers_pipeline(name: str, kind: str, scheduler: str, spacing: str, options: Any, **own: Any) -> Any:
    is_base = CONFIGS[kind].kind == "base"
    tokenizers = {"tokenizer": tokenizer("<|endoftext|>") if is_base else None, "tokenizer_2": tokenizer()}
    parts = diffusers_parts(kind) | tokenizers | own
    return assembled(name, scheduler, {"timestep_spacing": spacing} | options, is_base, **parts)


def use_the_peers_table(patch: pytest.MonkeyPatch) -> None:
    """Ours on diffusers' own float32 table of sigmas, whose lowest level is 1.3e-5 off."""
    alphas_cumprod = diffusers_refiner().scheduler.alphas_cumprod
    table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().double().numpy()
    create = NoiseSchedule.__init__

    def init(self: NoiseSchedule) -> None:
        create(self)
        assert np.abs(self.table / table - 1).max() < 2e-5
        self.table = table

    patch.setattr(NoiseSchedule, "__init__", init)


def diffusers_base(
    scheduler: str = "EulerDiscreteScheduler", spacing: str = "leading", kind: str = "base", **options: Any
) -> Any:
    """`options` are the scheduler's."""
    return diffusers_pipeline("StableDiffusionXLPipeline", kind, scheduler, spacing, options)


def diffusers_base_img2img(
    scheduler: str = "EulerDiscreteScheduler", kind: str = "base", spacing: str = "leading", **options: Any
) -> Any:
    """The base's own parts in the pipeline of pictures and noisy latents."""
    name = "StableDiffusionXLImg2ImgPipeline"
    return diffusers_pipeline(name, kind, scheduler, spacing, options, requires_aesthetics_score=False)


def diffusers_inpaint(kind: str, scheduler: str = "EulerDiscreteScheduler", spacing: str = "leading") -> Any:
    """With a UNet of 4 channels: it pastes the noised picture in between the steps."""
    options = {"requires_aesthetics_score": CONFIGS[kind].kind == "refiner"}
    return diffusers_pipeline("StableDiffusionXLInpaintPipeline", kind, scheduler, spacing, {}, **options)


def diffusers_refiner(
    scheduler: str = "EulerDiscreteScheduler", spacing: str = "leading", kind: str = "refiner", **options: Any
) -> Any:
    """`options` are the scheduler's."""
    name = "StableDiffusionXLImg2ImgPipeline"
    return diffusers_pipeline(name, kind, scheduler, spacing, options, requires_aesthetics_score=True)
