"""What a callback is told of a step, and what it makes of it. Loaded where there is one."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.steps import Step


def check(inputs: Sequence[str]) -> None:
    """InputError where a callback is to be handed what is not to be had."""
    if list(inputs) not in ([], ["latents"]):
        raise InputError(f'callback_on_step_end_tensor_inputs: only "latents" are to be had, found {list(inputs)}')


def steer(pipe: Any, request: Any, callback: Callable[..., Any], inputs: Sequence[str], i: int, step: Step) -> None:
    """Go on from the latents that a callback returned. InputError unless it returned nothing, or these alone."""
    timestep = pipe.plan(request).grid.timesteps[i]
    changes = callback(pipe, i, timestep, dict.fromkeys(inputs, step.x))
    if changes is None or changes == {}:
        return
    latents = changes.get("latents") if isinstance(changes, dict) and len(changes) == 1 else None
    if not isinstance(latents, Tensor) or latents.shape != step.x.shape:
        expected = f'nothing or {{"latents": a tensor {tuple(step.x.shape)}}}'
        raise InputError(f"expected callback_on_step_end to return {expected}, found {changes!r:.60}")
    step.x.copy_(latents)
