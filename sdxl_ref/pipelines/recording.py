"""The settings that a call's pictures carry in `info`: what the pipeline knows by itself, as the command line's PNG.

`picture.info["parameters"]` is the form that viewers read, `picture.info["sdxl_ref"]` the JSON. To keep them in a file:

    from sdxl_ref.pictures.settings import png_chunks
    picture.save("picture.png", pnginfo=png_chunks(picture.info))

Pictures, masks, latents and embeds that went in, functions around the denoiser and replaced networks are not recorded,
and of a checkpoint its name alone: its hash would take reading the whole file.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdxl_ref import __version__
from sdxl_ref.pictures.images import from_tensor
from sdxl_ref.pictures.settings import texts
from sdxl_ref.pipelines.request import Request

NOT_RECORDED = ("image", "mask_image", "latents", "generator", "output_type")
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def settings(pipe: Any, request: Request, watermark: bool) -> dict[str, Any]:
    """Of a run that is about to begin; a setting of None is the default. `seed` is one for each generator."""
    completed = request.completed(pipe.defaults)
    values = {f.name: getattr(completed, f.name) for f in fields(completed) if not f.name.endswith("_embeds")}
    recorded: dict[str, Any] = {name: value for name, value in values.items() if name not in NOT_RECORDED}
    recorded["spacing"] = str(completed.spacing)
    recorded |= {"seed": seeds(request.generator), "adapters": adapters(pipe), "watermark": watermark}
    plan = pipe.plan(request)
    recorded |= {"plan": str(plan), "sigmas": plan.grid.sigmas.tolist()}
    kinds = {"dtype": pipe.dtype, "vae_dtype": next(pipe.vae.parameters()).dtype, "device": pipe.device}
    recorded |= {name: str(kind).removeprefix("torch.") for name, kind in kinds.items()}
    for prefix, model in zip(("", "refiner_"), pipe.models(), strict=False):
        recorded[f"{prefix}prediction"] = model.config.prediction
        recorded[f"{prefix}unconditional"] = model.unconditional(request) if request.guided else "none"
        if model.checkpoint is not None:
            recorded[f"{prefix}checkpoint"] = {"file": model.checkpoint.path.name}
    return recorded | {"versions": {"sdxl_ref": __version__, "torch": torch.__version__}}


def pictures(images: Tensor, recorded: Mapping[str, Any]) -> list[Image.Image]:
    """(b,3,H,W) in [0, 1] -> pictures, each with the settings of the run, its own prompt and its own seed.

    The one place that imports the watermark, for a run that has one.
    """
    results = from_tensor(images)
    if recorded["watermark"]:
        from sdxl_ref.pictures.watermark import embed

        results = [embed(picture) for picture in results]
    count = len(results)
    for i, picture in enumerate(results):
        own = {name: one_of(recorded.get(name), i, count) for name in (*PROMPTS, "seed")}
        own["size"] = f"{picture.width}x{picture.height}"
        if count > 1:
            own |= {"images": count, "number": i}
        picture.info.update(texts({**recorded, **own}))
    return results


def one_of(values: Any, i: int, count: int) -> Any:
    """What picture i of `count` has of values, each of which serves the same number of pictures in a row."""
    return values[i * len(values) // count] if isinstance(values, list | tuple) else values


def seeds(generator: torch.Generator | list[torch.Generator] | None) -> Any:
    """The seed of a generator, or of each; None where the system seeds it, or where it has drawn before."""
    if isinstance(generator, list):
        return [seeds(one) for one in generator]
    if generator is None:
        return None
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if torch.equal(generator.get_state(), fresh.get_state()) else None


def adapters(pipe: Any) -> dict[str, float]:
    """The adapters that change the weights now, each with its weight. They are kept on the networks themselves."""
    weights: dict[str, float] = {}
    for model in pipe.models():
        for network in (model.unet, model.text_encoder, model.text_encoder_2):
            state = vars(network).get("adapters") if network is not None else None
            weights |= {name: active.weight for name, active in (state.active if state else {}).items()}
    return weights
