"""Where a run starts: from noise, from a picture that is noised (SDEdit), or from what another run left."""

import os
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.noise import Generator, draw_noise, fresh_generators
from sdxl_ref.pictures.images import fit, load_image, to_tensor
from sdxl_ref.pipelines.request import Request


class Start(NamedTuple):
    """x at the first level of a run, the generators that go on from there, and what of the picture stays."""

    x: Tensor  # (b,4,h,w)
    generator: Generator
    mask: Any = None  # see `masking`


def start_of(pipe: Any, r: Request, grid: Grid) -> Start:
    """What the run of a completed request starts from; `pipe` is the `Pipeline` whose VAE encodes a picture.

    The one place that imports what a run from noise needs.
    """
    if r.image is not None and r.latents is not None:
        raise InputError("give either image or latents: a run starts from one of them")
    if r.image is None and (r.latents is None or not r.is_noisy):
        from sdxl_ref.pipelines.first_noise import first_noise

        return Start(*first_noise(pipe, r, grid))
    return noised_image(pipe, r, grid)


def noised_image(pipe: Any, r: Request, grid: Grid) -> Start:
    """A picture's latents (b,4,h,w) with noise of exactly the first level; latents that are noisy as they are."""
    if r.height is not None or r.width is not None:
        raise InputError("height and width are those of noise: a picture has its own, resize it")
    image = image_tensor(pipe, r).to(pipe.device)  # (n,3,H,W) or (n,4,h,w)
    is_latent = image.shape[1] == pipe.config.vae.embed_dim
    count = max(r.prompts, len(image)) * r.num_images_per_prompt
    if count % len(image) or count % r.prompts:
        raise InputError(f"expected one image, or one for each of {r.prompts} prompts, found {len(image)}")
    copies = count // len(image)
    generator = fresh_generators(count) if r.generator is None else r.generator
    if is_latent:
        clean = image.float().repeat_interleave(copies, 0)  # (n,4,h,w) -> (b,4,h,w)
    else:
        clean = pipe.encode_image(image, generator, copies)  # (n,3,H,W) -> (b,4,h,w)
    mask = None if r.mask_image is None else pipe.mask_of(r, image, clean)
    if r.is_noisy:
        return Start(clean, generator, mask)
    return Start(clean + grid.sigmas[0].to(clean) * draw_noise(clean.shape, generator).to(clean), generator, mask)


def image_tensor(pipe: Any, r: Request) -> Tensor:
    """The pictures (n,3,H,W) in [-1,1] or latents (n,4,h,w) of a request. InputError for other kinds.

    The one place that imports what several pictures, arrays, tensors and latents need.
    """
    image: Any = r.latents if r.image is None else r.image
    if not r.is_noisy and isinstance(image, Image.Image | str | os.PathLike):
        return to_tensor(fit(load_image(image)))
    from sdxl_ref.pictures.arrays import from_arrays

    return from_arrays(image, pipe.config.vae.embed_dim, not r.is_noisy)
