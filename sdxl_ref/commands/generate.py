"""`sdxl-ref generate`: a prompt in, pictures out, by the base alone, the ensemble, or the base and then SDEdit."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.commands.common import identity, pick_device, sampling, writable
from sdxl_ref.config import InputError
from sdxl_ref.images import from_tensor, save_png
from sdxl_ref.on_demand import Slot
from sdxl_ref.pipelines.ensemble import EnsemblePipeline, EnsembleRequest
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline, ImageToImageRequest
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline, TextToImageRequest
from sdxl_ref.saving import save_latents

SHARED = ["prompt", "negative_prompt", "guidance_scale", "guidance_rescale", "sampler", "spacing", "karras"]
BASE_ONLY = ("prompt_2", "negative_prompt_2", "height", "width")
SCORES = ("aesthetic_score", "negative_aesthetic_score")
SWITCHES = ("switch", "switch_sigma", "switch_step")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base", required=True, type=Path, metavar="FILE", help="safetensors, official layout")
    p.add_argument("--refiner", type=Path, metavar="FILE", help="finish with it: as an ensemble, or see --two-stage")
    p.add_argument("--switch", type=float, help="ensemble: hand-off after this share of the training steps (0.8)")
    p.add_argument("--switch-sigma", type=float, help="ensemble: hand-off below this noise level, instead")
    p.add_argument("--switch-step", type=int, help="ensemble: hand-off after this number of steps, instead")
    p.add_argument("--two-stage", action="store_true", help="a whole run of the base, then SDEdit by the refiner")
    p.add_argument("--strength", type=float, help="share of the steps that the second stage runs (0.3)")
    p.add_argument("--height", type=int, default=1024)
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--prompt-2", help="for the second text encoder; without it, the prompt")
    p.add_argument("--negative-prompt-2", help="for the second text encoder; without it, the negative prompt")
    p.add_argument("--aesthetic-score", type=float, help="refiner: of the picture wanted (6.0)")
    p.add_argument("--negative-aesthetic-score", type=float, help="refiner: of the picture to steer away from (2.5)")
    p.add_argument("--num-images", type=int, default=1, help="one file each, seeds counted up, and a contact sheet")
    p.add_argument("--low-memory", action="store_true", help="one set of weights in memory at a time")
    sampling(p)


def check(a: argparse.Namespace) -> None:
    """InputError for options that do not go together."""
    for name in ("two_stage", *SCORES, *SWITCHES):
        if getattr(a, name) not in (None, False) and a.refiner is None:
            raise InputError(f"--{name.replace('_', '-')} is the refiner's: give --refiner FILE too, or leave it out")
    if a.strength is not None and not a.two_stage:
        raise InputError("--strength is that of the second stage: give --two-stage too, or leave it out")
    if a.two_stage and any(getattr(a, name) is not None for name in SWITCHES):
        raise InputError("--switch… is the ensemble's, --two-stage has none: give one of them")
    if a.num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {a.num_images}")


def run(a: argparse.Namespace) -> None:
    check(a)
    out = a.out or Path("generated.png")
    outs = [out.with_stem(f"{out.stem}-{i}") for i in range(a.num_images)] if a.num_images > 1 else [out]
    writable(out, *outs, a.save_latents)
    given = {name: getattr(a, name) for name in SHARED}
    generator = [torch.Generator().manual_seed(a.seed + i) for i in range(a.num_images)]
    common = given | {"num_inference_steps": a.steps, "generator": generator}
    first = common | {name: getattr(a, name) for name in BASE_ONLY} | {"num_images_per_prompt": a.num_images}
    scores = {name: getattr(a, name) for name in SCORES}
    options: dict[str, Any] = {"dtype": getattr(torch, a.dtype), "device": pick_device(a.device)}
    if a.low_memory:
        options["slot"] = Slot()

    with torch.no_grad():
        if a.refiner is not None and not a.two_stage:
            ensemble = EnsembleRequest(**first, **scores, **{name: getattr(a, name) for name in SWITCHES})
            plans: list[Any] = [EnsemblePipeline.plan(ensemble)]
            pipe = EnsemblePipeline.from_single_file(a.base, a.refiner, **options)
            base, refiner = pipe.base, pipe.refiner
            latents = drain(pipe, ensemble, plans[0])
        else:
            request = TextToImageRequest(**first)
            plans = [TextToImagePipeline.plan(request)]
            second = ImageToImageRequest(**common, **scores, strength=a.strength)
            if a.two_stage:
                plans.append(ImageToImagePipeline.plan(second))
            base, refiner = TextToImagePipeline.from_single_file(a.base, **options), None
            if a.two_stage:
                refiner = ImageToImagePipeline.from_single_file(a.refiner, **options, vae=base.vae)
            latents = drain(base, request, plans[0])
            if refiner is not None:
                prompts = [a.prompt] * a.num_images
                second = ImageToImageRequest(
                    **common | {"prompt": prompts}, **scores, strength=a.strength, image=latents
                )
                latents = drain(refiner, second, plans[1])
        pictures = from_tensor(base.decode(latents))

    settings = given | {name: getattr(a, name) for name in (*BASE_ONLY, *SCORES, *SWITCHES, "strength", "dtype")}
    settings |= {"command": "generate", "num_inference_steps": a.steps, "size": f"{a.width}x{a.height}"}
    settings |= {"plan": [str(plan) for plan in plans], "sigmas": [plan.grid.sigmas.tolist() for plan in plans]}
    absent = a.negative_prompt is None and a.negative_prompt_2 is None
    settings["unconditional"] = "base zeros, refiner the empty prompt" if absent else "negative prompt encoded"
    settings |= identity(base.checkpoint) if base.checkpoint else {}
    if refiner is not None and refiner.checkpoint is not None:
        settings["refiner_checkpoint"] = identity(refiner.checkpoint)["checkpoint"]
    if a.save_latents:
        save_latents(a.save_latents, latents, 0.0)
    for i, (path, picture) in enumerate(zip(outs, pictures, strict=True)):
        save_png(picture, path, settings | {"seed": a.seed + i})
    if a.num_images > 1:
        save_png(contact_sheet(pictures), out, settings | {"seed": a.seed, "images": a.num_images})
    print(f"wrote {', '.join(str(path) for path in dict.fromkeys([*outs, out]))}")


def drain(pipe: Any, request: Any, plan: Any) -> Tensor:
    """Print the plan, run it under a progress bar, and return the final latents (b,4,h,w)."""
    print(f"plan: {plan}", flush=True)
    for step in tqdm(pipe.steps(request), total=len(plan.grid.timesteps), unit="step", disable=None):
        latents = step.x
    return latents


def contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in a grid, row by row, with 8 white pixels between them."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].width + 8, pictures[0].height + 8
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - 8, rows * height - 8), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
