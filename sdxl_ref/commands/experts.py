"""A base and a refiner of a command: their files, and what a picture's settings say of the second one."""

from typing import Any

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.pipelines.ensemble import EnsemblePipeline
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.model import check_kind
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.weights.checkpoint import Checkpoint

__all__ = ["EnsemblePipeline"]


def opened(base: str, refiner: str | None, variant: str | None, vae: str | None) -> list[Checkpoint]:
    """The base's file, and the refiner's where there is one, without their weights; the base's VAE decodes.

    InputError for one that is not what it should be.
    """
    others = []
    if refiner is not None:
        others = [ImageToImagePipeline.open(refiner, variant, vae=True)]
        check_kind("refiner", others[0].config, others[0].path)
    return [TextToImagePipeline.open(base, variant, vae=vae), *others]


def refiner_settings(identity: dict[str, Any], switch: float | None) -> dict[str, Any]:
    """Of the refiner's file, and the level down to which the base runs; None: it is a stage of its own."""
    weights = {name: identity["checkpoint"][name] for name in ("file", "sha256")}
    name = weights["file"].removesuffix(".safetensors")
    settings: dict[str, Any] = {"refiner": f"{name} [{weights['sha256'][:10]}]"}  # as viewers know it
    settings["refiner_switch"] = None if switch is None else switch_share(switch)
    return settings | {"refiner_checkpoint": weights}  # its VAE is not used


def switch_share(sigma: float) -> float:
    """The share of the training steps, from the noisiest, at this level or above: the web UI's switch."""
    levels = NoiseSchedule().sigmas
    return len(levels[levels >= sigma]) / len(levels)
