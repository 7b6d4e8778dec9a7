"""What model cards call on a pipeline besides, with the ecosystem's names. Loaded when one of it is first called."""

from typing import Any

import torch

from sdxl_ref.weights.offload import model_cpu_offload


def enable_model_cpu_offload(pipe: Any, device: str | torch.device = "cuda") -> None:
    """Keep the networks in the CPU's memory; each moves to the device when it works, and back for the next one.

    Where there is no such device, a warning says so and everything stays where it is. InputError where parts come
    when they work already.
    """
    model_cpu_offload(pipe.models(), device)
