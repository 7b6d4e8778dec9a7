"""Networks packed or compiled for a run of a command: loaded unless they are to stay as they are."""

from collections.abc import Callable
from typing import Any

import torch

from sdxl_ref.config import InputError
from sdxl_ref.networks.freed_memory import keep_freed_memory


def chosen(compiles: bool, device: torch.device) -> Callable[[Any], dict[str, bool]]:
    """What makes a pipeline's networks fast here, and returns what its pictures' settings say of it.

    To be had before the weights are read: from then on freed memory is kept for others. InputError where networks
    are to be compiled and nothing can be.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if not compiles:
        return pack_networks
    from sdxl_ref.pipelines import compiled

    compiled.try_compiler(device)
    return compile_networks


def pack_networks(pipe: Any) -> dict[str, bool]:
    """Pack what can be packed: the networks of a CPU that has kernels for it."""
    packs = pipe.device.type == "cpu"
    if packs:
        try:
            pipe.pack()
        except InputError as error:
            print(f"note: {error}")
            packs = False
    return {"packed": packs, "compiled": False}


def compile_networks(pipe: Any) -> dict[str, bool]:
    from sdxl_ref.pipelines import compiled

    print("compiling: the first evaluation takes minutes", flush=True)
    compiled.compile_networks(pipe.models())
    return {"packed": False, "compiled": True}
