"""Text to image: from noise at the first level to a picture, by the base (Podell et al. 2023, arXiv:2307.01952)."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import Step
from sdxl_ref.diffusion.schedule import TRAIN_STEPS, Grid, NoiseSchedule
from sdxl_ref.noise import Generator, draw_noise, fresh_generators
from sdxl_ref.pipelines.pipeline import Pipeline, Plan, Prompt, Request, run

UNIT_VARIANCE = ("ddim", "ddpm")  # start from unit noise in their own scaling, whatever the spacing


@dataclass(frozen=True, kw_only=True)
class TextToImageRequest(Request):
    """`latents` are unit noise (b,4,h,w), scaled to the first level by the pipeline; None: drawn from the generator."""

    height: int | None = None  # a multiple of 8; None: that of the training pictures, 1024
    width: int | None = None
    denoising_end: float | None = None  # share of the training steps after which this run stops


class TextToImagePipeline(Pipeline):
    """SDXL's base alone. Arguments have the names and meanings of the ecosystem's text-to-image pipeline."""

    kind, request_type = "base", TextToImageRequest

    @staticmethod
    def plan(request: TextToImageRequest) -> Plan:
        """Which steps will run. InputError where none would."""
        r, schedule = request, NoiseSchedule()
        for name, side in (("height", r.height), ("width", r.width)):
            if side is not None and (side < 8 or side % 8):
                raise InputError(f"{name} must be a multiple of 8, found {side}")
        grid = schedule.grid(r.num_inference_steps, r.spacing, r.karras)
        stop = len(grid.timesteps)
        if r.denoising_end is not None:
            stop = grid.steps_above(schedule.switch_sigma(r.denoising_end))
        if stop < 1:
            raise InputError(
                f"denoising_end {r.denoising_end} leaves 0 of {r.num_inference_steps} steps: use a larger one"
            )
        return Plan(grid.cut(0, stop), r.num_inference_steps)

    @torch.no_grad()
    def steps(self, request: TextToImageRequest) -> Iterator[Step]:
        """The algorithm: draw noise, encode the prompt, denoise step by step."""
        r, grid = request, self.plan(request).grid
        x, generator = self.first_noise(r, grid)
        size = (x.shape[2] * self.vae_scale_factor, x.shape[3] * self.vae_scale_factor)
        yield from run(self.denoiser(r, grid, len(x), size), r, grid.sigmas, x, generator)

    def first_noise(self, r: TextToImageRequest, grid: Grid) -> tuple[Tensor, Generator]:
        """Noise (b,4,h,w) at the first level of the grid, and the generators that go on from there.

        A warning where that level is far below pure noise, as with "leading" and 1 or 2 steps.
        """
        if (t := grid.timesteps[0]) < 0.65 * TRAIN_STEPS:
            steps = f'"{r.spacing}" with {r.num_inference_steps} steps'
            warnings.warn(f"{steps} starts at t = {t:g}, far below pure noise", stacklevel=2)
        prompts: Prompt = [r.prompt] if isinstance(r.prompt, str) else r.prompt
        h, w = ((side or self.config.resolution) // self.vae_scale_factor for side in (r.height, r.width))
        shape = (len(prompts) * r.num_images_per_prompt, self.config.vae.embed_dim, h, w)
        if r.latents is not None and (r.latents.ndim != 4 or tuple(r.latents.shape[:2]) != shape[:2]):
            raise InputError(f"expected latents ({shape[0]},{shape[1]},h,w), found {tuple(r.latents.shape)}")
        if r.latents is not None and (r.height or r.width) and tuple(r.latents.shape) != shape:
            raise InputError(f"expected latents {shape} for this height and width, found {tuple(r.latents.shape)}")
        generator = fresh_generators(shape[0]) if r.generator is None else r.generator
        noise = draw_noise(shape, generator) if r.latents is None else r.latents.float()
        spacing = "leading" if r.sampler in UNIT_VARIANCE else r.spacing
        return noise.to(self.device) * NoiseSchedule().initial_scale(grid.sigmas, spacing), generator
