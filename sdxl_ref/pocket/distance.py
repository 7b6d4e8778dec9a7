"""Sliced Wasserstein distance of patches, by scale: how far the look of two sets of pictures is apart.

Source: Karras et al. 2018 (arXiv:1710.10196), section 5: 7x7 patches of each level of a Laplacian pyramid (Burt &
Adelson 1983), projected on random directions, sorted, compared. Channels are measured in the second set's mean and
spread, so that an overall shift counts too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, PATCHES, DIRECTIONS = 7, 64, 256  # pixels a side; patches a picture; random projections
KERNEL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def patch_distances(first: Tensor, second: Tensor, levels: int = 3) -> dict[int, float]:
    """Two sets of n pictures (n,3,H,W) in [0,1] -> distance times 1000 by the side in pixels of each scale."""
    generator = torch.Generator().manual_seed(0)
    pairs = zip(pyramid(first, levels), pyramid(second, levels), strict=True)
    return {int(a.shape[-1]): 1000 * sliced(patches(a, generator), patches(b, generator), generator) for a, b in pairs}


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Laplacian: each level less what its half tells of it, halved from one to the next; the last is what remains."""
    found = []
    for _ in range(levels - 1):
        low = blur(images)[:, :, ::2, ::2]
        sparse = torch.zeros_like(images)
        sparse[:, :, ::2, ::2] = 4 * low
        found.append(images - blur(sparse))  # each pixel of `low` back where it was taken
        images = low
    return [*found, images]


def blur(images: Tensor) -> Tensor:
    channels = images.shape[1]
    row = KERNEL.reshape(1, 1, 1, 5).expand(channels, 1, 1, 5)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, row, groups=channels), row.transpose(2, 3), groups=channels)


def patches(images: Tensor, generator: torch.Generator) -> Tensor:
    """(n,3,h,w) -> (n*PATCHES, 3*7*7), at random places."""
    n, _, h, w = images.shape
    every = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (n,3,h-6,w-6,7,7)
    rows = torch.randint(h - PATCH + 1, (n, PATCHES), generator=generator)
    columns = torch.randint(w - PATCH + 1, (n, PATCHES), generator=generator)
    found = every[torch.arange(n)[:, None], :, rows, columns].flatten(0, 1)  # (n*PATCHES,3,7,7)
    return found.flatten(1)


def sliced(first: Tensor, second: Tensor, generator: torch.Generator) -> float:
    """Mean over directions of the 1-d Wasserstein distance; both sets are measured in the second's mean and spread."""
    mean, spread = (each.repeat_interleave(PATCH * PATCH) for each in channel_moments(second))
    directions = F.normalize(torch.randn(first.shape[1], DIRECTIONS, generator=generator), dim=0)
    a, b = (((each - mean) / spread @ directions).sort(dim=0).values for each in (first, second))
    return float((a - b).abs().mean())


def channel_moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    channels = flat.reshape(len(flat), -1, PATCH * PATCH)
    return channels.mean(dim=(0, 2)), channels.std(dim=(0, 2))
