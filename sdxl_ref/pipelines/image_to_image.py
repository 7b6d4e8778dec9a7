"""Image to image: noise a picture up to a level and denoise it from there (SDEdit, Meng et al. 2021,
arXiv:2108.01073), or go on from a noisy latent that another run left. The refiner's main job.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import Step
from sdxl_ref.diffusion.schedule import NoiseSchedule, strength_steps
from sdxl_ref.images import fit, load_image, to_tensor
from sdxl_ref.noise import draw_noise, fresh_generators
from sdxl_ref.pipelines.pipeline import Pipeline, Plan, Request, run


@dataclass(frozen=True, kw_only=True)
class ImageToImageRequest(Request):
    """`image` is one of: a PIL picture or several; pictures (b,3,H,W) in [-1,1]; latents (b,4,h,w), scaled by 0.13025.

    Without `denoising_start` it is clean, and noised to the first level that `strength` leaves. With
    `denoising_start` it is a noisy latent that stands at the first level already. `latents` stand in for the image
    where they are noisy, at the first level of `strength`.
    """

    image: Image.Image | Sequence[Image.Image] | Tensor | None = None
    strength: float | None = None  # None: 0.3
    denoising_start: float | None = None  # share of the training steps that another network has done
    denoising_end: float | None = None  # share after which this run stops
    strength_rule: str = "exact"  # or "sgm", the official code's


class ImageToImagePipeline(Pipeline):
    """SDXL's refiner on a picture. Arguments have the names and meanings of the ecosystem's img2img pipeline."""

    kind, request_type = "refiner", ImageToImageRequest

    @staticmethod
    def plan(request: ImageToImageRequest) -> Plan:
        """Which steps will run. InputError where none would, or where the request contradicts itself."""
        r, steps = request, request.num_inference_steps
        schedule = NoiseSchedule()
        grid = schedule.grid(steps, r.spacing, r.karras)
        if r.denoising_start is None:
            start = steps - strength_steps(steps, 0.3 if r.strength is None else r.strength, r.strength_rule)
        elif r.strength is None:
            start = grid.steps_above(schedule.switch_sigma(r.denoising_start))
        else:
            raise InputError("strength and denoising_start both say where to begin: give one of them")
        stop = steps if r.denoising_end is None else grid.steps_above(schedule.switch_sigma(r.denoising_end))
        if start >= stop:
            between = f"denoising_start {r.denoising_start} and denoising_end {r.denoising_end}"
            raise InputError(f"0 of {steps} steps lie between {between}: use more steps, or a wider range")
        return Plan(grid.cut(start, stop), steps)

    @torch.no_grad()
    def steps(self, request: ImageToImageRequest) -> Iterator[Step]:
        """The algorithm: encode the prompt, encode the picture, add noise, denoise step by step."""
        r, grid = request, self.plan(request).grid
        image, clean = self._image(r)
        latent = image.shape[1] == self.config.vae.embed_dim
        prompts = 1 if isinstance(r.prompt, str) else len(r.prompt)
        count = max(prompts, len(image)) * r.num_images_per_prompt
        if count % len(image):
            raise InputError(f"expected one image, or one for each of {prompts} prompts, found {len(image)}")
        generator, copies = r.generator or fresh_generators(count), count // len(image)

        scale = self.vae_scale_factor if latent else 1
        denoise = self.denoiser(r, grid, count, (image.shape[2] * scale, image.shape[3] * scale))
        if latent:
            x = image.float().repeat_interleave(copies, 0)  # (n,4,h,w) -> (b,4,h,w)
        else:
            x = self.encode_image(image, generator, copies)  # (n,3,H,W) -> (b,4,h,w)
        if clean:  # to exactly the level that is denoised first
            x = x + grid.sigmas[0].to(x) * draw_noise(x.shape, generator).to(x)
        yield from run(denoise, r, grid.sigmas, x, generator)

    def _image(self, r: ImageToImageRequest) -> tuple[Tensor, bool]:
        """The picture or latents of a request on the device, and whether they are clean. InputError for other kinds."""
        if (r.image is None) == (r.latents is None):
            raise InputError("give either image or latents (noisy, at the first level that runs)")
        if r.latents is not None and r.strength is None and r.denoising_start is None:
            raise InputError("latents have no level: give the strength, or the denoising_start, at which they stand")
        given = r.latents if r.image is None else r.image
        clean = r.latents is None and r.denoising_start is None
        if not isinstance(given, Tensor):
            pictures = [given] if isinstance(given, Image.Image | str) else given
            tensors = [to_tensor(fit(load_image(each))) for each in pictures or []]
            if len({each.shape for each in tensors}) != 1:
                raise InputError(f"expected pictures of one size, found {[tuple(each.shape[2:]) for each in tensors]}")
            given = torch.cat(tensors)
        latent = given.ndim == 4 and given.shape[1] == self.config.vae.embed_dim
        if not latent and (not clean or given.ndim != 4 or given.shape[1] != 3 or any(s % 8 for s in given.shape[2:])):
            kinds = "latents (b,4,h,w)" + (" or pictures (b,3,H,W) with sides that are multiples of 8" if clean else "")
            noisy = "" if clean else ", since denoising_start and latents go on from a noisy latent"
            raise InputError(f"expected {kinds}{noisy}, found a tensor {tuple(given.shape)}")
        return given.to(self.device), clean
