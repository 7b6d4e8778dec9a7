"""Denoising of large pictures by windows: `denoise(x, sigma)` whose estimate is the weighted average of the windows'.

One run of the solver, which does not know: windows overlap, and each evaluation visits all of them in turn, so that the
memory is one window's. Source: Bar-Tal et al. 2023, "MultiDiffusion" (arXiv:2302.08113), equation 5.
Shapes: b batch, h w latent height and width. Sizes are in latent cells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.steps import Denoise

SIZE = 128  # cells of a window's side: 1024 pixels, what SDXL was trained on
OVERLAP = 32
MULTIPLE = 8  # of a window's side: 64 pixels, the step of SDXL's buckets


class Tile(NamedTuple):
    """A window of a latent, in cells."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiled:
    """x (b,4,h,w) and sigma -> the estimate of the whole, from windows of at most `size` x `size` cells.

    `make` returns the denoiser of a window, under a conditioning of its own; it is asked for each at every evaluation.
    Neighbours share at least `overlap` cells, over which one fades into the other. A picture that is no larger than a
    window is one: then this is that window's denoiser. InputError for sizes that no windows can have.
    """

    make: Callable[[Tile], Denoise]
    size: int = SIZE
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < MULTIPLE or self.size % MULTIPLE:
            raise InputError(f"a tile's side must be a multiple of {MULTIPLE} latent cells, found {self.size!r:.60}")
        if type(self.overlap) is not int or not 0 < self.overlap <= self.size // 2:
            half = f"from 1 to half of a tile's {self.size} latent cells"
            raise InputError(f"the overlap of tiles must be {half}, found {self.overlap!r:.60}")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = spans(height, self.size, self.overlap)
        columns = spans(width, self.size, self.overlap)
        if len(rows) == len(columns) == 1:
            return self.make(Tile(0, 0, height, width))(x, sigma)
        estimate = torch.zeros_like(x)
        for row in rows:
            for column in columns:
                tile = Tile(row.start, column.start, len(row.weights), len(column.weights))
                here = (..., slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width))
                weights = row.weights[:, None] * column.weights  # (tile's h, tile's w)
                estimate[here] += weights.to(x) * self.make(tile)(x[here].contiguous(), sigma)
        return estimate


class Span(NamedTuple):
    """A window's extent along one side, with its weight at each cell."""

    start: int
    weights: Tensor


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """Windows, evenly spread over a side of so many cells; at each cell their weights sum to 1.

    A window's weight rises along the cells that it shares as half a cosine: neither it nor its slope has a step.
    """
    size = min(size, length)
    count = 1 + math.ceil((length - size) / (size - overlap)) if length > size else 1
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    weights = torch.ones(count, size, dtype=torch.float64)
    for i in range(1, count):
        shared = starts[i - 1] + size - starts[i]
        rise = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(shared, dtype=torch.float64) + 0.5) / shared)
        weights[i, :shared] *= rise
        weights[i - 1, size - shared :] *= 1 - rise
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return [Span(start, weight / total[start : start + size]) for start, weight in zip(starts, weights, strict=True)]
