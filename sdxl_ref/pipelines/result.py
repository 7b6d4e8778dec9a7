"""Run a request to its end and pack the result as the caller wants it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.images import from_tensor
from sdxl_ref.pipelines.pipeline import Prompt, Runnable

Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PipelineOutput(NamedTuple):
    images: Any  # as `output_type` says: PIL pictures, (b,H,W,3) array, (b,3,H,W) tensor, or latents (b,4,h,w)


@torch.no_grad()
def finish(
    pipeline: Runnable,
    prompt: Prompt,
    *,
    output_type: str = "pil",
    callback_on_step_end: Callback | None = None,
    **arguments: Any,
) -> PipelineOutput:
    """Drain the pipeline's steps; `arguments` are the fields of its `request_type`.

    Latents are scaled by 0.13025, in sigma space. `callback_on_step_end(pipeline, i, sigma, {"latents": x})` is
    called after each step; it may return {"latents": …}, from which the run goes on.
    """
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"unknown output_type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
    for i, step in enumerate(pipeline.steps(pipeline.request_type(prompt=prompt, **arguments))):
        if callback_on_step_end is not None:
            changed = callback_on_step_end(pipeline, i, float(step.sigma), {"latents": step.x})
            step.x.copy_((changed or {}).get("latents", step.x))
    if output_type == "latent":
        return PipelineOutput(step.x)
    images = pipeline.decode(step.x)
    if output_type == "np":
        return PipelineOutput(images.cpu().permute(0, 2, 3, 1).numpy())  # (b,3,h,w) -> (b,h,w,3)
    return PipelineOutput(images if output_type == "pt" else from_tensor(images))
