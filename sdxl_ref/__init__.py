"""sdxl-ref: Stable Diffusion XL's refiner and the system around it, from scratch, in plain PyTorch.

A name is imported from its module when it is first used: `import sdxl_ref` is quick. `__init__.pyi` types the names.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
_NAMES = {
    "config": ("TextEncoderConfig", "UNetConfig", "VAEConfig"),
    "diffusion.samplers": ("SAMPLERS",),
    "diffusion.schedule": ("NoiseSchedule",),
    "networks.clip_l": ("CLIPTextEncoder",),
    "networks.openclip_g": ("OpenCLIPTextEncoder",),
    "networks.packing": ("pack", "unpack"),
    "networks.unet": ("UNet",),
    "networks.vae": ("AutoencoderKL",),
    "pictures.images": ("load_image",),
    "pipelines": ("DiffusionPipeline", "EnsemblePipeline", "ImageToImagePipeline", "TextToImagePipeline"),
    "text.tokenizer": ("tokenize",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdxl_ref' has no attribute {name!r}")
    return getattr(import_module(f"sdxl_ref.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
