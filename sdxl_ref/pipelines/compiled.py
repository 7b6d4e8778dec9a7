"""Compile the UNet and the VAE of pipelines by `torch.compile`, for pictures of any size. Loaded when one is asked to.

Fused kernels sum in another order, so the outputs are those of the plain networks but for rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental import _config as shapes

from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import is_packed, is_without_weights


def compile_networks(pipelines: Sequence[Any], backend: str = "inductor") -> None:
    """Have each UNet and VAE compiled as one graph when it first works; once for all heights, widths and batches.

    But for a batch of one, which PyTorch always compiles by itself. In place: hooks, names and weights stay. The
    text towers work once in a run, and are left as they are. InputError for networks that are packed, or that are
    read when they work.
    """
    parts = [part for pipe in pipelines for part in (pipe.unet, pipe.vae.encoder, pipe.vae.decoder)]
    for part in parts:
        if is_without_weights(part):
            raise InputError("networks that are read when they work cannot be compiled: have them read at once")
        if is_packed(part):
            raise InputError("packed networks cannot be compiled: call unpack first")
    shapes.use_duck_shape = False  # or what was compiled for a square picture would be for squares alone
    for part in dict.fromkeys(parts):  # pipelines may share one
        part.compile(fullgraph=True, dynamic=True, backend=backend)


def try_compiler(device: torch.device) -> None:
    """InputError, in one line, unless PyTorch can compile for a device here: it wants a C++ compiler, or Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"nothing can be compiled for {device} here: {why}") from error
