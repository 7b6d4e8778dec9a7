"""What model cards call on a pipeline besides, with the ecosystem's names. Loaded when one of it is first called."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sdxl_ref.config import InputError, unknown
from sdxl_ref.weights.checkpoint import PARTS, prefixes
from sdxl_ref.weights.offload import model_cpu_offload
from sdxl_ref.weights.sequential_offload import sequential_cpu_offload


def components_of(pipe: Any) -> dict[str, Any]:
    """What a pipeline is made of, by the names that another one takes: `ImageToImagePipeline(**base.components)`.

    The networks, their configuration, the checkpoint that they were read from, and how its model is run; of an
    ensemble its two pipelines.
    """
    models = pipe.models()
    if len(models) > 1:
        return {model.config.kind: model for model in models}
    names = ("config", *PARTS, "checkpoint", "defaults", "offload")
    return {name: getattr(pipe, name) for name in names}


components = property(components_of)


def pipeline_from(cls: Any, /, pipe: Any, **parts: Any) -> Any:
    """A pipeline of this class that shares another one's networks, or has others in the place of some (`vae=`, …).

    Everything else that was set on `pipe` is kept: adapters lie on the networks, and how its model is run, the offload,
    the progress bar and `wrap_denoiser` go with it. InputError for a model that this class does not run, or a part that
    is no network of it; TypeError for another argument.
    """
    if not hasattr(pipe, "models") or len(pipe.models()) != 1 or not hasattr(cls, "kinds"):
        raise InputError(
            f"{cls.__name__}.from_pipe takes a pipeline of one model, found {type(pipe).__name__}: hand it `.base` or "
            "`.refiner` of an ensemble, and two pipelines to EnsemblePipeline(base, refiner)"
        )
    cls.check(pipe.config)
    check_parts(cls, pipe, parts)
    new = cls(**components_of(pipe) | parts)
    own = vars(pipe) | parts
    if "vae" in parts:  # its scale, and what it makes of a picture
        own["config"] = replace(pipe.config, vae=getattr(parts["vae"], "config", pipe.config.vae))
    vars(new).update(own | {"_progress": dict(pipe._progress)})
    return new


from_pipe = classmethod(pipeline_from)


def check_parts(cls: Any, pipe: Any, parts: dict[str, Any]) -> None:
    """InputError or TypeError unless these are networks that such a model has."""
    for name, part in parts.items():
        if name in ("dtype", "torch_dtype"):
            raise InputError("both pipelines share the networks: leave the dtype out, or call .to(dtype) for both")
        if name not in PARTS:
            raise TypeError(f"{cls.__name__}.from_pipe: {unknown('argument', name, PARTS)}")
        if name not in prefixes(pipe.config):
            raise InputError(f"an SDXL {pipe.config.kind} has no {name}: leave it out")
        if not isinstance(part, nn.Module):
            raise InputError(f"expected {name} to be a network, found {part!r:.60}: from_pretrained reads files")


def enable_model_cpu_offload(pipe: Any, device: str | torch.device = "cuda") -> None:
    """Keep the networks in the CPU's memory; each moves to the device when it works, and back for the next one.

    Where there is no such device, a warning says so and everything stays where it is. InputError where parts come
    when they work already.
    """
    model_cpu_offload(pipe.models(), device)


def enable_sequential_cpu_offload(pipe: Any, device: str | torch.device = "cuda") -> None:
    """Keep the networks in the CPU's memory; the weights of each layer or small block come to the device for its work.

    The least memory of a device, and slow: every evaluation of the UNet moves all its weights. Otherwise as
    `enable_model_cpu_offload`, and InputError for networks that are packed.
    """
    sequential_cpu_offload(pipe.models(), device)
