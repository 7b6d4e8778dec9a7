"""sdxl-ref: Stable Diffusion XL's refiner and the system around it, from scratch, in plain PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_ref.config import TextEncoderConfig, UNetConfig, VAEConfig
    from sdxl_ref.diffusion.samplers import SAMPLERS
    from sdxl_ref.diffusion.schedule import NoiseSchedule
    from sdxl_ref.images import load_image
    from sdxl_ref.networks.clip_l import CLIPTextEncoder
    from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder
    from sdxl_ref.networks.unet import UNet
    from sdxl_ref.networks.vae import AutoencoderKL
    from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
    from sdxl_ref.tokenizer import tokenize

__version__ = "0.1.0"

# A name is imported when it is first used, so that `import sdxl_ref` costs nothing and a reader loads what he uses.
_HOME = {
    "UNet": "networks.unet",
    "UNetConfig": "config",
    "OpenCLIPTextEncoder": "networks.openclip_g",
    "CLIPTextEncoder": "networks.clip_l",
    "TextEncoderConfig": "config",
    "AutoencoderKL": "networks.vae",
    "VAEConfig": "config",
    "tokenize": "tokenizer",
    "NoiseSchedule": "diffusion.schedule",
    "SAMPLERS": "diffusion.samplers",
    "ImageToImagePipeline": "pipelines.image_to_image",
    "load_image": "images",
}
__all__ = [
    "SAMPLERS",
    "AutoencoderKL",
    "CLIPTextEncoder",
    "ImageToImagePipeline",
    "NoiseSchedule",
    "OpenCLIPTextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "load_image",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdxl_ref' has no attribute {name!r}")
    value = getattr(import_module(f"sdxl_ref.{_HOME[name]}"), name)
    globals()[name] = value
    return value
