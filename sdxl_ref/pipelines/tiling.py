"""A pipeline's denoiser by windows, each told which crop it is. Loaded where large pictures are asked for."""

from dataclasses import replace
from functools import partial
from typing import Any

from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.diffusion.steps import Denoise
from sdxl_ref.diffusion.tiles import OVERLAP, SIZE, Tile, Tiled
from sdxl_ref.networks import tiled_vae as bands
from sdxl_ref.text.conditioning import Numbers, PromptEmbeds

Size = tuple[int, int]  # height, width in pixels


def tiled_denoiser(
    pipe: Any, request: Any, text: PromptEmbeds, size: Size, grid: Grid, tile: int = SIZE, overlap: int = OVERLAP
) -> Tiled:
    """`pipe.denoiser(…)` of pictures of this size, by windows of `tile` latent cells a side; guidance inside each.

    Of one window it is the pipeline's own denoiser. InputError as `Tiled`.
    """

    def make(window: Tile) -> Denoise:
        told = request_of_tile(pipe, request, size, window)
        return pipe.denoiser(request, pipe.condition(told, text, size), grid)

    return Tiled(make, tile, overlap)


class TiledVAE:
    """An autoencoder that works in bands of rows: see `tiled_vae`."""

    def __init__(self, vae: Any) -> None:
        self.encode = partial(bands.encode, vae)
        self.decode = partial(bands.decode, vae)


def tiled_vae(pipe: Any) -> TiledVAE:
    """The pipeline's autoencoder in bands."""
    return TiledVAE(pipe.vae)


def request_of_tile(pipe: Any, request: Any, size: Size, tile: Tile) -> Any:
    """A request that says of a window, on both sides, which crop of the picture it is."""
    scale = pipe.vae_scale_factor
    positive, negative = (crop(numbers, tile, size, scale) for numbers in pipe.sizes(request, size))
    return replace(
        request,
        original_size=positive.original_size,
        crops_coords_top_left=positive.crop,
        target_size=positive.target_size,
        negative_original_size=negative.original_size,
        negative_crops_coords_top_left=negative.crop,
        negative_target_size=negative.target_size,
    )


def crop(numbers: Numbers, tile: Tile, size: Size, scale: int) -> Numbers:
    """What a UNet is told of a window of a picture, of which it is told `numbers`; a cell has `scale` pixels a side.

    Its corner adds to the picture's own crop. The target size is the window's, unless one was asked for that is not
    the picture's.
    """
    corner = numbers.crop[0] + tile.top * scale, numbers.crop[1] + tile.left * scale
    if numbers.target_size == size:
        numbers = replace(numbers, target_size=(tile.height * scale, tile.width * scale))
    return replace(numbers, crop=corner)
