"""The pipelines, each imported when it is first asked for. `__init__.pyi` types the names."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "DiffusionPipeline": "diffusion",
    "EnsemblePipeline": "ensemble",
    "ImageToImagePipeline": "image_to_image",
    "TextToImagePipeline": "text_to_image",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdxl_ref.pipelines' has no attribute {name!r}")
    return getattr(import_module(f"sdxl_ref.pipelines.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
