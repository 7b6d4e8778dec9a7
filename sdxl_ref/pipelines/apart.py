"""A run in parts: each picture by itself, each window of a large one. Loaded where a request asks for it.

A kernel may sum in another order for another batch: then the last bits of a picture depend on how many there are, and
on its place among them. With `batch_invariant` text and UNet see one picture at a time, as the VAE does anyway. What
remains is done number by number: the sampler's arithmetic, and the noise, where each picture has its own generator.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.diffusion.steps import Denoise
from sdxl_ref.pipelines.pipeline import per_image
from sdxl_ref.pipelines.recording import PROMPTS
from sdxl_ref.pipelines.tiling import tiled_denoiser
from sdxl_ref.text.conditioning import PromptEmbeds


@dataclass(frozen=True)
class Apart:
    """`denoise(x, sigma)` of b pictures, each by its own denoiser."""

    denoisers: list[Denoise]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([denoise(one, sigma) for denoise, one in zip(self.denoisers, x.split(1), strict=True)])


def denoiser_in_parts(pipe: Any, r: Any, text: PromptEmbeds, x: Tensor, grid: Grid) -> Denoise:
    """`denoise(x, sigma)` of latents like x (b,4,h,w): by pictures where they are to be apart, and then by windows."""
    if not r.batch_invariant:
        return tiled_denoiser(pipe, r, text, pipe.picture_size(x), grid)
    requests = [of_picture(r, i, len(x)) for i in range(len(x))]
    return Apart([pipe.conditioned(own, one(text, i), x[i : i + 1], grid) for i, own in enumerate(requests)])


def encode_apart(pipe: Any, r: Any, count: int) -> PromptEmbeds:
    """What the UNet reads of a request's prompts, for `count` pictures, each encoded by itself."""
    texts = [pipe.encode_request(of_picture(r, i, count), 1) for i in range(count)]
    sides: Any = (None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*texts, strict=True))
    return PromptEmbeds(*sides)


def one(text: PromptEmbeds, i: int) -> PromptEmbeds:
    """Of b pictures those of number i."""
    own: Any = (None if tensor is None else tensor[i : i + 1] for tensor in text)
    return PromptEmbeds(*own)


def of_picture(r: Any, i: int, count: int) -> Any:
    """The request for picture number i of `count` alone. InputError for texts that do not go round."""
    own: dict[str, Any] = {"batch_invariant": False, "num_images_per_prompt": 1}
    for name in PROMPTS:
        if getattr(r, name) is not None:
            own[name] = per_image(getattr(r, name), count)[i]
    for field in fields(r):
        value = getattr(r, field.name)
        if field.name.endswith("_embeds") and isinstance(value, Tensor) and count % len(value) == 0:
            own[field.name] = value[i * len(value) // count][None]
    if isinstance(r.guidance_scale, Tensor) and r.guidance_scale.numel() == count:
        own["guidance_scale"] = r.guidance_scale.reshape(-1)[i : i + 1]
    return replace(r, **own)
