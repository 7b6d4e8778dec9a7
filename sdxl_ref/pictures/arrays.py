"""Pictures and latents as arrays and tensors, as `output_type="np"`, "pt" and "latent" give them; and lists."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import MULTIPLE, fit, load_image, to_tensor

PICTURES = "a picture, its file, a tensor (3,H,W) or (b,3,H,W), an array (H,W,3) or (b,H,W,3), or a list of one kind"
NOISY = "latents (b,{},h,w), since denoising_start and latents go on from a noisy latent"
MOST = 1000  # pictures of a call
VALUES = "expected values from 0 to 1 in floating point, or uint8 from 0 to 255"


def from_arrays(image: Any, channels: int, clean: bool) -> Tensor:
    """Pictures -> (n,3,H,W) float32 in [-1, 1]; latents (n,4,h,w) are returned as they are; `channels` is theirs.

    `image` is one tensor or array, or a list of them or of what `load_image` takes. Values of pictures are in [0, 1];
    where one of them is negative all are taken as [-1, 1], with a warning, as diffusers does
    (`VaeImageProcessor.preprocess`); uint8 is 0 to 255. InputError for anything else, for pictures where only noisy
    latents can be meant (not `clean`), for several sizes or types, and for sides that are no multiples of 8.
    """
    expected = f"{PICTURES}, or latents (b,{channels},h,w)" if clean else NOISY.format(channels)
    items = list(image) if isinstance(image, list | tuple) else [image]
    if any(isinstance(item, Tensor | np.ndarray) and 0 in item.shape for item in items) or not items:
        raise InputError("expected a picture, or one for each prompt, found none")
    count = sum(len(item) if isinstance(item, Tensor | np.ndarray) and item.ndim == 4 else 1 for item in items)
    if count > MOST:
        raise InputError(f"expected at most {MOST} pictures at once, found {count}: hand them in by and by")
    if clean and all(isinstance(item, Image.Image | str | os.PathLike) for item in items):
        return joined([to_tensor(fit(load_image(item))) for item in items])
    batch = joined([batch_of(item, expected, channels) for item in items])  # (n,c,h,w)
    if batch.is_floating_point() and not torch.isfinite(batch).all():
        raise InputError("an image has values that are not finite (NaN or infinite): check what made it")
    if batch.shape[1] == channels and batch.is_floating_point():
        return batch
    if not clean:
        raise InputError(f"expected {expected}, found a tensor {tuple(batch.shape)}")
    if any(side % MULTIPLE for side in batch.shape[2:]):
        raise InputError(
            f"expected pictures with sides that are multiples of {MULTIPLE}, found {batch.shape[2]} x {batch.shape[3]} "
            "(height x width): crop or resize them, or hand in a PIL picture, which is cropped"
        )
    return scaled(batch)


def joined(batches: Sequence[Tensor]) -> Tensor:
    """Several (b,c,h,w) as one. InputError unless they are of one size and type."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise InputError(f"expected pictures of one size, found {[tuple(batch.shape[2:]) for batch in batches]}")
    if len({batch.dtype for batch in batches}) > 1:
        raise InputError(f"expected pictures of one type, found {[str(batch.dtype) for batch in batches]}")
    return torch.cat(list(batches))


def batch_of(item: Any, expected: str, channels: int) -> Tensor:
    """One tensor or array -> (b,3,H,W), or (b,channels,h,w) of latents. InputError for another shape or type."""
    if isinstance(item, np.ndarray):
        if item.ndim not in (3, 4) or item.shape[-1] != 3:
            hint = ": move the channels to the end" if item.ndim in (3, 4) and item.shape[-3] == 3 else ""
            raise InputError(f"expected {expected}, found an array {item.shape}{hint}")
        if item.dtype != np.uint8 and item.dtype.kind != "f":
            raise InputError(f"{VALUES}, found {item.dtype}")
        values = np.array(item, np.uint8 if item.dtype == np.uint8 else np.float32)  # a copy: some are read-only
        return batch_of(torch.from_numpy(values).movedim(-1, -3), expected, channels)  # (…,h,w,3) -> (…,3,h,w)
    if not isinstance(item, Tensor):
        raise InputError(f"expected {expected}, found {type(item).__name__}")
    if item.ndim not in (3, 4) or item.shape[-3] not in (3, channels):
        hint = ": move the channels to the front" if item.ndim in (3, 4) and item.shape[-1] == 3 else ""
        raise InputError(f"expected {expected}, found a tensor {tuple(item.shape)}{hint}")
    return item if item.ndim == 4 else item[None]  # (c,h,w) -> (1,c,h,w)


def scaled(batch: Tensor) -> Tensor:
    """Pictures (n,3,H,W) -> float32 in [-1, 1], by the type and the range of their values."""
    if batch.dtype == torch.uint8 and batch.shape[1] == 3:
        return 2.0 * (batch.float() / 255.0) - 1.0
    if not batch.is_floating_point():
        raise InputError(f"{VALUES}, found {str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}")
    batch = batch.float()
    lowest = float(batch.min())
    highest = float(batch.max())
    if lowest < -1 or highest > 1:
        raise InputError(f"{VALUES}, found values from {lowest:g} to {highest:g}: divide or convert them")
    if lowest >= 0:
        return 2.0 * batch - 1.0
    message = f"an image has values below 0 ({lowest:g}) and is taken as [-1, 1]: pictures are expected in [0, 1]"
    warnings.warn(message, stacklevel=2)
    return batch
