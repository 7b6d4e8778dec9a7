"""The pipelines as the ecosystem's code uses them: `from_pretrained`, then `pipe(prompt, …).images`.

Each class is that of `sdxl_ref.pipelines` with the calls of diffusers' pipelines on top; what runs is the same `steps`.
These are the classes that `sdxl_ref` exports.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdxl_ref.checkpoint import open_checkpoint
from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import Step
from sdxl_ref.hub import resolve
from sdxl_ref.images import MULTIPLE, from_tensor
from sdxl_ref.on_demand import Moved, Slot
from sdxl_ref.pipelines.ensemble import EnsemblePipeline as Ensemble
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline as ImageToImage
from sdxl_ref.pipelines.pipeline import Prompt
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline as TextToImage
from sdxl_ref.watermark import check, embed

Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
Self = TypeVar("Self", bound="Pretrained")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PipelineOutput(NamedTuple):
    images: Any  # as `output_type` says: PIL pictures, (b,H,W,3) array, (b,3,H,W) tensor, or latents (b,4,h,w)


class Called:
    """A pipeline that is called with the fields of its request."""

    request_type: type[Any]
    steps: Callable[..., Iterator[Step]]  # of a request
    decode: Callable[..., Tensor]  # latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1]

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        watermark: bool = False,
        **arguments: Any,
    ) -> PipelineOutput:
        """Make a request of the arguments, drain its steps, and pack the result.

        Latents are scaled by 0.13025, in sigma space. `callback_on_step_end(pipeline, i, sigma, {"latents": x})` is
        called after each step; it may return {"latents": …}, from which the run goes on. `watermark` puts the official
        code's invisible one into PIL pictures.
        """
        if watermark and output_type != "pil":
            raise InputError(f'a watermark goes into output_type "pil" only, found {output_type!r}')
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        for i, step in enumerate(self.steps(self.request_type(prompt=prompt, **arguments))):
            if watermark and i == 0:  # not after the whole run
                check(MULTIPLE * step.x.shape[3], MULTIPLE * step.x.shape[2])
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, i, float(step.sigma), {"latents": step.x})
                step.x.copy_((changed or {}).get("latents", step.x))
        if output_type == "latent":
            return PipelineOutput(step.x)
        images = self.decode(step.x)
        if output_type == "np":
            return PipelineOutput(images.cpu().permute(0, 2, 3, 1).numpy())  # (b,3,h,w) -> (b,h,w,3)
        if output_type == "pt":
            return PipelineOutput(images)
        if watermark:
            return PipelineOutput([embed(each) for each in from_tensor(images)])
        return PipelineOutput(from_tensor(images))


class Pretrained(Called):
    """A pipeline of one checkpoint."""

    kind: str
    from_single_file: Callable[..., Any]

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        *,
        variant: str | None = None,
        use_safetensors: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Open a file, a folder in diffusers' layout, "pocket", or a repository of the hub by its id.

        `variant` ("fp16") picks files such as `model.fp16.safetensors`. `options` are those of `from_single_file`:
        `torch_dtype` or `dtype`, `device`, and parts that are shared instead of loaded (`vae=base.vae`).
        """
        if not use_safetensors:
            raise InputError("only safetensors files are opened, never a pickle: leave use_safetensors=False out")
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = resolve(name, cls.kind, variant=variant, token=token, **where)
        return cls.from_single_file(path, variant=variant, **options)

    def enable_model_cpu_offload(self, device: str = "cuda") -> None:
        """Keep the networks in the CPU's memory; each moves to the device when it works, and back for the next one.

        Where there is no such device, a warning says so and everything stays where it is.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"there is no {device} device: every part stays where it is", stacklevel=2)
            return
        slot = Slot()
        for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
            network = getattr(self, part)
            if network is not None:
                setattr(self, part, Moved(slot, part, network, device))


class TextToImagePipeline(Pretrained, TextToImage):
    __doc__ = TextToImage.__doc__


class ImageToImagePipeline(Pretrained, ImageToImage):
    __doc__ = ImageToImage.__doc__


class EnsemblePipeline(Called, Ensemble):
    __doc__ = Ensemble.__doc__


class DiffusionPipeline:
    """Opens what the files are: `TextToImagePipeline` for a base, `ImageToImagePipeline` for a refiner."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> TextToImagePipeline | ImageToImagePipeline:
        """As `Pretrained.from_pretrained`."""
        names = ("variant", "revision", "cache_dir", "local_files_only", "token")
        path = resolve(name, **{key: options[key] for key in names if key in options})
        kind = open_checkpoint(path, options.get("variant")).config.kind
        found = TextToImagePipeline if kind == "base" else ImageToImagePipeline
        return found.from_pretrained(path, **options)
