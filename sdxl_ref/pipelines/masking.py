"""The mask of a run: `mask_image`, white where the picture is painted. Loaded where there is one.

A latent cell is painted where any pixel of it is above 0, with the weight of its brightest one; of the picture that is
decoded, all pixels where the mask is exactly 0 are the picture's own. With latents in place of a picture there are none
to paste.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.masks import Mask
from sdxl_ref.pictures.images import MULTIPLE, fit, load_image

FILES = (Image.Image, str, os.PathLike)  # what a picture is read from
FORMS = "a picture, its file, or values from 0 to 1 (or uint8) as (H,W), (n,H,W) or (n,1,H,W)"


def mask_of(_pipe: Any, request: Any, image: Tensor, clean: Tensor) -> Mask:
    """The mask of a request for its pictures (n,3,H,W) in [-1,1], or latents, and their latents (b,4,h,w) without
    noise. InputError where it does not fit, or where it paints nothing or everything."""
    if request.is_noisy:
        raise InputError("a mask wants the picture without noise: give image and strength, or use EnsemblePipeline")
    is_latent = image.shape[1] == clean.shape[1]
    size = tuple(side * MULTIPLE if is_latent else side for side in image.shape[2:])
    pixels = read(request.mask_image, photo_of(request.image)).to(clean.device)  # (m,1,H,W)
    if tuple(pixels.shape[2:]) != size:
        raise InputError(
            f"expected a mask of the picture's size {size}, found {tuple(pixels.shape[2:])} (height, width)"
        )
    if len(clean) % len(pixels) or len(pixels) > len(image):
        raise InputError(f"expected one mask, or one for each of {len(image)} pictures, found {len(pixels)}")
    is_painted = (pixels > 0).flatten(1)  # (m,H*W)
    if not is_painted.any(1).all():
        raise InputError("a mask is black everywhere, so that nothing would be painted: paint white where it should")
    if is_painted.all(1).any():
        raise InputError("a mask leaves nothing as it is: leave mask_image out, or paint black what is to stay")
    pixels = pixels.repeat_interleave(len(clean) // len(pixels), 0)  # (m,1,H,W) -> (b,1,H,W)
    pictures = image.repeat_interleave(len(clean) // len(image), 0)  # (n,3,H,W) -> (b,3,H,W)

    def paste_own(images: Tensor) -> Tensor:
        return images if is_latent else paste(images, pictures, pixels)

    return Mask(max_pool2d(pixels, MULTIPLE), clean, paste_own)  # (b,1,H,W) -> (b,1,h,w)


def paste(images: Tensor, picture: Tensor, pixels: Tensor) -> Tensor:
    """Pictures (b,3,H,W) in [0,1] with the pixels of `picture`, in [-1,1], where the mask (m,1,H,W) is exactly 0."""
    return torch.where(pixels.to(images) > 0, images, (picture * 0.5 + 0.5).to(images))


def fitted(mask: Any, photo: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The mask of a picture, a picture of its size, shrunk and cropped as `fit` does with the picture itself.

    InputError where its size is another one.
    """
    picture = load_image(mask).convert("L")
    if picture.size != photo.size:
        sizes = f"{photo.width}x{photo.height}, found {picture.width}x{picture.height}"
        raise InputError(f"expected a mask of the picture's size {sizes} (width x height)")
    return fit(picture, max_pixels)


def photo_of(image: Any) -> Image.Image | None:
    """The picture, or the first of several, which are cropped when they are read; None of arrays and tensors."""
    images = image if isinstance(image, list | tuple) else [image]
    return load_image(images[0]) if all(isinstance(one, FILES) for one in images) else None


def read(mask: Any, photo: Image.Image | None = None) -> Tensor:
    """A mask, or a list of one kind -> (m,1,H,W) float32 in [0,1], for pictures of the size of `photo`.

    InputError for anything else.
    """
    if isinstance(mask, list | tuple):
        masks = [read(one, photo) for one in mask]
        if len({one.shape for one in masks}) != 1:
            raise InputError(f"expected masks of one size, found {[tuple(one.shape[2:]) for one in masks]}")
        return torch.cat(masks)
    if isinstance(mask, FILES):
        picture = load_image(mask).convert("L") if photo is None else fitted(mask, photo)
        return torch.from_numpy(np.array(picture)).float()[None, None] / 255  # (H,W) -> (1,1,H,W)
    values = torch.as_tensor(mask) if isinstance(mask, Tensor | np.ndarray) else None
    if values is None or values.ndim not in (2, 3, 4) or (values.ndim == 4 and values.shape[1] != 1):
        found = type(mask).__name__ if values is None else f"{type(mask).__name__} {tuple(values.shape)}"
        raise InputError(f"expected a mask as {FORMS}, found {found}")
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"expected a mask as {FORMS}, found values from {values.min():g} to {values.max():g}")
    return values.reshape(-1, 1, *values.shape[-2:])  # (…,H,W) -> (m,1,H,W)
