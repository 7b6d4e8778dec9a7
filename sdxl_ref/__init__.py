"""sdxl-ref: Stable Diffusion XL's refiner and the system around it, from scratch, in plain PyTorch.

A name is imported from its module when it is first used: `import sdxl_ref` is quick. `__init__.pyi` types them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "config": ["TextEncoderConfig", "UNetConfig", "VAEConfig"],
    "diffusion.samplers": ["SAMPLERS"],
    "diffusion.schedule": ["NoiseSchedule"],
    "ecosystem": ["DiffusionPipeline", "EnsemblePipeline", "ImageToImagePipeline", "TextToImagePipeline"],
    "images": ["load_image"],
    "networks.clip_l": ["CLIPTextEncoder"],
    "networks.openclip_g": ["OpenCLIPTextEncoder"],
    "networks.unet": ["UNet"],
    "networks.vae": ["AutoencoderKL"],
    "tokenizer": ["tokenize"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdxl_ref' has no attribute {name!r}")
    return getattr(import_module(f"sdxl_ref.{_MODULE_OF[name]}"), name)
