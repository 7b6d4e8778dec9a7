"""Text to image: from noise at the first level to a picture, by the base (Podell et al. 2023, arXiv:2307.01952)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion.schedule import TRAIN_STEPS, Grid, NoiseSchedule
from sdxl_ref.noise import Generator, draw_noise, fresh_generators
from sdxl_ref.pipelines.calling import Steps
from sdxl_ref.pipelines.pipeline import GridPlan, Pipeline, sample
from sdxl_ref.pipelines.request import Request, option

LARGEST_SIDE = 16_384  # pixels; a picture of 4096 is more than most machines have memory for


@dataclass(frozen=True, kw_only=True)
class TextToImageRequest(Request):
    """`latents` are unit noise (b,4,h,w), scaled to the first level by the pipeline; None: drawn from the generator."""

    height: int | None = option("a multiple of 8; None: that of the training pictures (SDXL: 1024)", None)
    width: int | None = option("a multiple of 8; None: that of the training pictures (SDXL: 1024)", None)
    denoising_end: float | None = option("share of the training steps after which this run stops", None)


class TextToImagePipeline(Pipeline):
    """SDXL's base alone. Arguments have the names and meanings of the ecosystem's text-to-image pipeline."""

    kind = "base"
    request_type = TextToImageRequest

    @staticmethod
    def plan_for(request: TextToImageRequest, defaults: Defaults = SDXL) -> GridPlan:
        """Which steps will run of a model with these defaults. InputError where none would."""
        r = request.completed(defaults)
        schedule = NoiseSchedule()
        for name, side in (("height", r.height), ("width", r.width)):
            if side is not None and (not 8 <= side <= LARGEST_SIDE or side % 8):
                raise InputError(f"{name} must be a multiple of 8, from 8 to {LARGEST_SIDE}, found {side}")
        grid = schedule.grid(r.num_inference_steps, r.spacing, bool(r.karras))
        stop = len(grid.timesteps)
        if r.denoising_end is not None:
            stop = grid.steps_above(schedule.switch_sigma(r.denoising_end))
        if stop < 1:
            raise InputError(
                f"denoising_end {r.denoising_end} leaves 0 of {r.num_inference_steps} steps: use a larger one"
            )
        return GridPlan(grid.cut(0, stop), r.num_inference_steps, request.left_open(defaults))

    @torch.no_grad()
    def steps(self, request: TextToImageRequest) -> Steps:
        """The algorithm: draw noise, encode the prompt, denoise step by step, decode."""
        r = request.completed(self.defaults)
        grid = self.plan(r).grid
        self.refuse_unusable(r)
        x, generator = self.first_noise(r, grid)  # (b,4,h,w)
        text = self.encode_prompt(
            r.prompt,
            r.prompt_2,
            num_images_per_prompt=r.num_images_per_prompt,
            do_classifier_free_guidance=r.guided,
            negative_prompt=r.negative_prompt,
            negative_prompt_2=r.negative_prompt_2,
        )
        conditioning = self.condition(r, text, self.picture_size(x))
        denoise = self.wrapped(self.denoiser(r, conditioning, grid))
        for step in sample(r, denoise, x, grid.sigmas, generator):
            yield step
        return step.x if r.output_type == "latent" else self.decode(step.x)

    def first_noise(self, request: TextToImageRequest, grid: Grid) -> tuple[Tensor, Generator]:
        """Noise (b,4,h,w) at the first level of the grid, and the generators that go on from there.

        A warning where that level is far below pure noise, as with "leading" and 1 or 2 steps.
        """
        r = request.completed(self.defaults)
        if (t := grid.timesteps[0]) < 0.65 * TRAIN_STEPS:
            steps = f'"{r.spacing}" with {r.num_inference_steps} steps'
            warnings.warn(f"{steps} starts at t = {t:g}, far below pure noise", stacklevel=2)
        h = (r.height or self.config.resolution) // self.vae_scale_factor
        w = (r.width or self.config.resolution) // self.vae_scale_factor
        shape = (r.prompts * r.num_images_per_prompt, self.config.vae.embed_dim, h, w)
        if r.latents is not None and (r.latents.ndim != 4 or tuple(r.latents.shape[:2]) != shape[:2]):
            raise InputError(f"expected latents ({shape[0]},{shape[1]},h,w), found {tuple(r.latents.shape)}")
        if r.latents is not None and (r.height or r.width) and tuple(r.latents.shape) != shape:
            raise InputError(f"expected latents {shape} for this height and width, found {tuple(r.latents.shape)}")
        generator = fresh_generators(shape[0]) if r.generator is None else r.generator
        noise = draw_noise(shape, generator) if r.latents is None else r.latents.float()
        return noise.to(self.device) * NoiseSchedule().initial_scale(grid.sigmas, r.spacing, str(r.sampler)), generator
