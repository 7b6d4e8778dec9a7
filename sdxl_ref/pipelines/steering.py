"""What a callback makes of a step. Loaded where there is one."""

from typing import Any

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.steps import Step


def steer(step: Step, changes: Any) -> None:
    """Go on from the latents that a callback returned. InputError unless it returned nothing, or these alone."""
    if changes is None or changes == {}:
        return
    latents = changes.get("latents") if isinstance(changes, dict) and len(changes) == 1 else None
    if not isinstance(latents, Tensor) or latents.shape != step.x.shape:
        expected = f'nothing or {{"latents": a tensor {tuple(step.x.shape)}}}'
        raise InputError(f"expected callback_on_step_end to return {expected}, found {changes!r:.60}")
    step.x.copy_(latents)
