"""Text to image: the noise that a run starts from. Loaded where there is no picture."""

import warnings
from typing import Any

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import TRAIN_STEPS, Grid, NoiseSchedule
from sdxl_ref.noise import Generator, draw_noise, fresh_generators
from sdxl_ref.pipelines.request import Request

LARGEST_SIDE = 16_384  # pixels; a picture of 4096 is more than most machines have memory for


def check_size(r: Request) -> None:
    """InputError unless a picture may have the sides that are asked for."""
    for name, side in (("height", r.height), ("width", r.width)):
        if side is not None and (not 8 <= side <= LARGEST_SIDE or side % 8):
            raise InputError(f"{name} must be a multiple of 8, from 8 to {LARGEST_SIDE}, found {side}")


def first_noise(pipe: Any, r: Request, grid: Grid) -> tuple[Tensor, Generator]:
    """Noise (b,4,h,w) at the first level of the grid, and the generators that go on from there.

    A warning where that level is far below pure noise, as with "leading" and 1 or 2 steps.
    """
    check_size(r)
    if pipe.config.kind == "refiner":
        level = "" if r.latents is None else ", and the strength or the denoising_start at which these stand"
        raise InputError(f"a refiner has not learnt pure noise: give an image, or noisy latents{level}")
    for name in ("strength", "denoising_start", "mask_image"):
        if getattr(r, name) is not None:
            raise InputError(f"{name} is of no use without an image: give one, or leave it out")
    if (t := grid.timesteps[0]) < 0.65 * TRAIN_STEPS:
        steps = f'"{r.spacing}" with {r.num_inference_steps} steps'
        warnings.warn(f"{steps} starts at t = {t:g}, far below pure noise", stacklevel=2)
    h = (r.height or pipe.config.resolution) // pipe.vae_scale_factor
    w = (r.width or pipe.config.resolution) // pipe.vae_scale_factor
    shape = (r.prompts * r.num_images_per_prompt, pipe.config.vae.embed_dim, h, w)
    if r.latents is not None and (r.latents.ndim != 4 or tuple(r.latents.shape[:2]) != shape[:2]):
        raise InputError(f"expected latents ({shape[0]},{shape[1]},h,w), found {tuple(r.latents.shape)}")
    if r.latents is not None and (r.height or r.width) and tuple(r.latents.shape) != shape:
        raise InputError(f"expected latents {shape} for this height and width, found {tuple(r.latents.shape)}")
    generator = fresh_generators(shape[0]) if r.generator is None else r.generator
    noise = draw_noise(shape, generator) if r.latents is None else r.latents.float()
    scale = NoiseSchedule().initial_scale(grid.sigmas, r.spacing, str(r.sampler))
    return noise.to(pipe.device) * scale, generator
