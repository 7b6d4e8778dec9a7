"""Image to image: noise a picture up to a level and denoise it from there (SDEdit, Meng et al. 2021,
arXiv:2108.01073), or go on from a noisy latent that another run left. The refiner's main job.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule, strength_steps
from sdxl_ref.noise import draw_noise, fresh_generators
from sdxl_ref.pictures.images import fit, load_image, to_tensor
from sdxl_ref.pipelines.calling import Steps
from sdxl_ref.pipelines.pipeline import GridPlan, Pipeline, sample
from sdxl_ref.pipelines.request import Request, Size, option
from sdxl_ref.text.conditioning import Numbers

STRENGTH = 0.3


@dataclass(frozen=True, kw_only=True)
class ImageToImageRequest(Request):
    """`image` is one of: a PIL picture, a path or an address, or several; pictures as arrays (b,H,W,3) or tensors
    (b,3,H,W), in [0,1] or uint8; latents (b,4,h,w), scaled by 0.13025.

    Without `denoising_start` it is clean, and noised to the first level that `strength` leaves. With
    `denoising_start` it is a noisy latent that stands at the first level already. `latents` stand in for the image
    where they are noisy, at the first level of `strength`.
    """

    image: Any = option("what to start from: see the request", None)
    strength: float | None = option("share of the steps that run, above 0 and at most 1; None: 0.3", None)
    denoising_start: float | None = option("share of the training steps that another network has done", None)
    denoising_end: float | None = option("share of the training steps after which this run stops", None)
    strength_rule: str = option('"exact", or "sgm" as the official code counts', "exact")

    @property
    def clean(self) -> bool:
        """Whether what it starts from has no noise yet."""
        return self.latents is None and self.denoising_start is None


class ImageToImagePipeline(Pipeline):
    """SDXL's refiner on a picture. Arguments have the names and meanings of the ecosystem's img2img pipeline."""

    kind = "refiner"
    request_type = ImageToImageRequest

    @staticmethod
    def plan_for(request: ImageToImageRequest, defaults: Defaults = SDXL) -> GridPlan:
        """Which steps will run of a model with these defaults.

        InputError where none would, or where the request contradicts itself.
        """
        r = request.completed(defaults)
        steps = r.num_inference_steps
        schedule = NoiseSchedule()
        grid = schedule.grid(steps, r.spacing, bool(r.karras))
        if r.denoising_start is None:
            start = steps - strength_steps(steps, STRENGTH if r.strength is None else r.strength, r.strength_rule)
        elif r.strength is None:
            start = grid.steps_above(schedule.switch_sigma(r.denoising_start))
        else:
            raise InputError("strength and denoising_start both say where to begin: give one of them")
        stop = steps if r.denoising_end is None else grid.steps_above(schedule.switch_sigma(r.denoising_end))
        if start >= stop:
            first = f"denoising_start {r.denoising_start}"
            if r.denoising_start is None:
                first = f"strength {r.strength or STRENGTH}"
            between = f"{first} and denoising_end {r.denoising_end}"
            raise InputError(f"0 of {steps} steps lie between {between}: use more steps, or a wider range")
        return GridPlan(grid.cut(start, stop), steps, request.left_open(defaults))

    @torch.no_grad()
    def steps(self, request: ImageToImageRequest) -> Steps:
        """The algorithm: encode the prompt, encode the picture, add noise, denoise step by step, decode."""
        r = request.completed(self.defaults)
        grid = self.plan(r).grid
        self.refuse_unusable(r)
        image = self.image_tensor(r).to(self.device)  # (n,3,H,W) or (n,4,h,w)
        is_latent = image.shape[1] == self.config.vae.embed_dim
        size = self.picture_size(image) if is_latent else (image.shape[2], image.shape[3])
        count = max(r.prompts, len(image)) * r.num_images_per_prompt
        if count % len(image):
            raise InputError(f"expected one image, or one for each of {r.prompts} prompts, found {len(image)}")
        if count % r.prompts:
            raise InputError(f"expected one prompt, or one for each image, found {r.prompts} for {count}")
        copies = count // len(image)
        generator = fresh_generators(count) if r.generator is None else r.generator

        text = self.encode_prompt(
            r.prompt,
            num_images_per_prompt=count // r.prompts,
            do_classifier_free_guidance=r.guided,
            negative_prompt=r.negative_prompt,
        )
        conditioning = self.condition(r, text, size)
        if is_latent:
            x = image.float().repeat_interleave(copies, 0)  # (n,4,h,w) -> (b,4,h,w)
        else:
            x = self.encode_image(image, generator, copies)  # (n,3,H,W) -> (b,4,h,w)
        if r.clean:  # to exactly the level that is denoised first
            x = x + grid.sigmas[0].to(x) * draw_noise(x.shape, generator).to(x)
        denoise = self.wrapped(self.denoiser(r, conditioning, grid))
        for step in sample(r, denoise, x, grid.sigmas, generator):
            yield step
        return step.x if r.output_type == "latent" else self.decode(step.x)

    def sizes(self, request: ImageToImageRequest, size: Size) -> tuple[Numbers, Numbers]:  # type: ignore[override]
        """As of every pipeline, but the negative crop is (0, 0) unless it is given, as diffusers' img2img has it."""
        positive, negative = super().sizes(request, size)
        return positive, replace(negative, crop=request.negative_crops_coords_top_left or (0, 0))

    def image_tensor(self, r: ImageToImageRequest) -> Tensor:
        """The pictures (n,3,H,W) in [-1,1] or latents (n,4,h,w) of a request. InputError for other kinds.

        The one place that imports what several pictures, arrays, tensors and latents need.
        """
        if (r.image is None) == (r.latents is None):
            raise InputError("give either image or latents (noisy, at the first level that runs)")
        if r.latents is not None and r.strength is None and r.denoising_start is None:
            raise InputError("latents have no level: give the strength, or the denoising_start, at which they stand")
        image: Any = r.latents if r.image is None else r.image
        if r.clean and isinstance(image, Image.Image | str | os.PathLike):
            return to_tensor(fit(load_image(image)))
        from sdxl_ref.pictures.arrays import from_arrays

        return from_arrays(image, self.config.vae.embed_dim, r.clean)
