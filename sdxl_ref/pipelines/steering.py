"""What is done after each step: a callback is called, and what it returns made true. Loaded where there is one.

And before a whole run is made for nothing, pictures that are to carry a watermark are found to be too small.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.steps import Step
from sdxl_ref.pictures import watermark


def steered(
    pipe: Any, request: Any, callback: Callable[..., Any] | None, inputs: Sequence[str], has_watermark: bool
) -> Callable[[int, Step], None]:
    """What calls a callback after each step, and goes on from the latents that it returns.

    InputError where it is to be handed what is not to be had, and later unless it returns nothing, or latents alone.
    """
    if list(inputs) not in ([], ["latents"]):
        raise InputError(f'callback_on_step_end_tensor_inputs: only "latents" are to be had, found {list(inputs)}')
    timesteps = pipe.plan(request).grid.timesteps

    def steer(i: int, step: Step) -> None:
        if has_watermark and i == 0:
            height, width = pipe.picture_size(step.x)
            watermark.check(width, height)
        if callback is None:
            return
        changes = callback(pipe, i, timesteps[i], dict.fromkeys(inputs, step.x))
        if changes is None or changes == {}:
            return
        latents = changes.get("latents") if isinstance(changes, dict) and len(changes) == 1 else None
        if not isinstance(latents, Tensor) or latents.shape != step.x.shape or not latents.is_floating_point():
            expected = f'nothing or {{"latents": a tensor {tuple(step.x.shape)} of floating point}}'
            raise InputError(f"expected callback_on_step_end to return {expected}, found {changes!r:.60}")
        step.x.copy_(latents)

    return steer
