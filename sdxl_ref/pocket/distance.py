"""Sliced Wasserstein distance of patches, by scale: how far the look of two sets of pictures is apart.

Source: Karras et al. 2018 (arXiv:1710.10196), section 5: 7x7 patches of each level of a Laplacian pyramid (Burt &
Adelson 1983), projected on random directions, sorted, compared. Channels are measured in the second set's mean and
standard deviation, so that an overall shift counts too.
Shapes: n pictures, h w their height and width at a level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 7  # pixels a side
PATCHES = 64  # of each picture
DIRECTIONS = 256
KERNEL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # binomial: Burt & Adelson's
SCALE = 1000  # of the distances


def patch_distances(first: Tensor, second: Tensor, levels: int = 3) -> dict[int, float]:
    """Two sets of n pictures (n,3,H,W) in [0,1] -> distance times 1000 by the side in pixels of each scale."""
    generator = torch.Generator().manual_seed(0)
    distances = {}
    for first_level, second_level in zip(pyramid(first, levels), pyramid(second, levels), strict=True):
        first_patches = patches(first_level, generator)
        second_patches = patches(second_level, generator)
        side = int(first_level.shape[-1])
        distances[side] = SCALE * sliced_distance(first_patches, second_patches, generator)
    return distances


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Laplacian, of pictures (n,3,H,W): what the half size does not show at each level, and the last half size.

    Level i is (n,3,H/2^i,W/2^i).
    """
    details = []
    for _ in range(levels - 1):
        low = blur(images)[:, :, ::2, ::2]  # (n,3,h,w) -> (n,3,h/2,w/2)
        sparse = torch.zeros_like(images)
        sparse[:, :, ::2, ::2] = 4 * low  # each pixel back where it was taken
        details.append(images - blur(sparse))
        images = low
    return [*details, images]


def blur(images: Tensor) -> Tensor:
    """Pictures (n,c,h,w) under the binomial kernel, mirrored at the edges."""
    channels = images.shape[1]
    row = KERNEL.reshape(1, 1, 1, 5).expand(channels, 1, 1, 5)  # (5,) -> (c,1,1,5)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")  # (n,c,h,w) -> (n,c,h+4,w+4)
    blurred_rows = F.conv2d(padded, row, groups=channels)  # (n,c,h+4,w)
    return F.conv2d(blurred_rows, row.transpose(2, 3), groups=channels)  # (n,c,h,w)


def patches(images: Tensor, generator: torch.Generator) -> Tensor:
    """(n,3,h,w) -> (n*PATCHES,3*7*7), at random positions."""
    n, _, h, w = images.shape
    windows = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (n,3,h-6,w-6,7,7)
    rows = torch.randint(h - PATCH + 1, (n, PATCHES), generator=generator)
    columns = torch.randint(w - PATCH + 1, (n, PATCHES), generator=generator)
    chosen = windows[torch.arange(n)[:, None], :, rows, columns]  # (n,PATCHES,3,7,7)
    return chosen.flatten(0, 1).flatten(1)  # (n*PATCHES,3*7*7)


def sliced_distance(first: Tensor, second: Tensor, generator: torch.Generator) -> float:
    """Mean over directions of the 1-d Wasserstein distance of two sets of patches (m,3*7*7)."""
    mean, deviation = (moment.repeat_interleave(PATCH * PATCH) for moment in channel_moments(second))  # (3,) -> (147,)
    directions = F.normalize(torch.randn(first.shape[1], DIRECTIONS, generator=generator), dim=0)
    first_sorted = ((first - mean) / deviation @ directions).sort(dim=0).values  # (m,DIRECTIONS)
    second_sorted = ((second - mean) / deviation @ directions).sort(dim=0).values
    return float((first_sorted - second_sorted).abs().mean())


def channel_moments(flat_patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of each channel of patches (m,3*7*7)."""
    channels = flat_patches.reshape(len(flat_patches), -1, PATCH * PATCH)  # (m,3,7*7)
    return channels.mean(dim=(0, 2)), channels.std(dim=(0, 2))
