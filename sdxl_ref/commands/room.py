"""Whether a run fits into the memory that is free: found out before any work, or tiled, or told in one line."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from sdxl_ref.pipelines.free_memory import free_memory
from sdxl_ref.pipelines.request import Request
from sdxl_ref.weights.checkpoint import Checkpoint, prefixes

ACTIVATIONS = 4_500  # bytes for each pixel of a batch: above what any stage of SDXL takes besides its weights
PLENTY = 1.5  # times what is needed at most: no plan is made, which takes a second
WINDOW = 1024  # pixels a side that one evaluation of the UNet takes, where it works in tiles
Size = tuple[int, int]  # height, width


def fitted(
    a: argparse.Namespace, checkpoints: Sequence[Checkpoint], request: Request, size: Size, device: torch.device
) -> tuple[Request, bool]:
    """The request, tiled where it would not fit otherwise, and whether the autoencoder works in bands.

    A line says where tiles are chosen. InputError where even these do not fit.
    """
    is_tiled = request.tile and max(size) > WINDOW  # a smaller picture is one tile
    pictures = request.prompts * request.num_images_per_prompt
    free = free_memory(str(device))
    dtypes = getattr(torch, a.dtype), getattr(torch, a.vae_dtype)
    weights = [bytes_of_weights(checkpoint, *dtypes) for checkpoint in checkpoints]
    most = sum(weights) + ACTIVATIONS * prod(size) * pictures * (1 + request.guided)
    if free is None or free > PLENTY * most:
        return request, is_tiled
    from sdxl_ref.pipelines import memory_plan

    low_memory = getattr(a, "low_memory", False)
    run = memory_plan.Run(
        checkpoints[0].config,
        *size,
        pictures,
        *dtypes,
        guided=request.guided,
        encodes=request.image is not None,
        tiled=is_tiled,
        packed=device.type == "cpu" and not (a.plain or a.compile),
        low_memory=low_memory,
        device=str(device),
    )
    for i, checkpoint in enumerate(checkpoints):
        others = 0 if low_memory else sum(weights[:i] + weights[i + 1 :])
        fitting, line = memory_plan.fitting(replace(run, config=checkpoint.config), free - others)
        if line and not is_tiled:
            print(line, flush=True)
        is_tiled = is_tiled or fitting.tiled
    return replace(request, tile=request.tile or is_tiled), is_tiled


def bytes_of_weights(checkpoint: Checkpoint, dtype: torch.dtype, vae_dtype: torch.dtype) -> int:
    """Of a model in memory."""
    vae = prefixes(checkpoint.config)["vae"]
    parts = ((key.startswith(vae), prod(shape)) for key, shape in checkpoint.shapes.items())
    return sum(numbers * (vae_dtype if is_vae else dtype).itemsize for is_vae, numbers in parts)
