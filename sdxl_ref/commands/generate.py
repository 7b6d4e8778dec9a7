"""`sdxl-ref generate`: a prompt in, pictures out, by the base alone, the ensemble, or the base and then SDEdit."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.commands.common import identity, keep_freed_memory, pick_device, sampling, writable
from sdxl_ref.config import InputError
from sdxl_ref.images import from_tensor, save_png
from sdxl_ref.lora import hashes, put_on
from sdxl_ref.on_demand import Slot
from sdxl_ref.pipelines.ensemble import EnsemblePipeline, EnsembleRequest
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline, ImageToImageRequest
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline, TextToImageRequest
from sdxl_ref.saving import save_latents
from sdxl_ref.sheets import contact_sheet
from sdxl_ref.watermark import check as check_watermark
from sdxl_ref.watermark import embed

SHARED = ["prompt", "negative_prompt", "guidance_scale", "guidance_rescale", "sampler", "spacing", "karras"]
BASE_ONLY = ("prompt_2", "negative_prompt_2", "height", "width")
SCORES = ("aesthetic_score", "negative_aesthetic_score")
SWITCHES = ("switch", "switch_sigma", "switch_step")


EXAMPLES = """examples:
  base alone:   sdxl-ref generate --base BASE --prompt "a red barn"
  ensemble:     sdxl-ref generate --base BASE --refiner REFINER --prompt "a red barn" --karras
  two stages:   sdxl-ref generate --base BASE --refiner REFINER --prompt "a red barn" --two-stage --strength 0.3

BASE and REFINER are safetensors files in the official layout, folders in diffusers' layout, repositories of the hub by
their id, or "pocket": the small pair, of 128 pixels, that is installed with this package. The ensemble is one run: the
base denoises first, the refiner from the hand-off on. --switch counts training steps (noise levels), not sampling
steps: with --karras 0.8 can mean 12 of 20 steps; the plan that is printed says. Without --out: generated.png.
"""


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EXAMPLES
    p.add_argument("--base", required=True, metavar="MODEL", help="file, folder, repository of the hub, or pocket")
    p.add_argument("--refiner", metavar="MODEL", help="finish with it: as an ensemble, or see --two-stage")
    p.add_argument("--switch", type=float, help="ensemble: hand-off after this share of the training steps (0.8)")
    p.add_argument("--switch-sigma", type=float, help="ensemble: hand-off below this noise level, instead")
    p.add_argument("--switch-step", type=int, help="ensemble: hand-off after this number of steps, instead")
    p.add_argument("--two-stage", action="store_true", help="a whole run of the base, then SDEdit by the refiner")
    p.add_argument("--strength", type=float, help="share of the steps that the second stage runs (0.3)")
    p.add_argument("--height", type=int, help="a multiple of 8; without it, that of the training pictures (1024)")
    p.add_argument("--width", type=int, help="likewise")
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
    if a.lora and a.low_memory:
        raise InputError("--lora changes weights that --low-memory drops: leave one of them out")
    if a.num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {a.num_images}")


def run(a: argparse.Namespace) -> None:
    check(a)
    out = a.out or Path("generated.png")
    outs = [out.with_stem(f"{out.stem}-{i}") for i in range(a.num_images)] if a.num_images > 1 else [out]
    writable(*dict.fromkeys((*outs, out)), a.save_latents, read=[a.base, *filter(None, {a.refiner} - {a.base})])
    seeds = [(a.seed + i) % 2**64 for i in range(a.num_images)]
    common = {name: getattr(a, name) for name in SHARED} | {"num_inference_steps": a.steps}
    common["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    first = common | {name: getattr(a, name) for name in BASE_ONLY} | {"num_images_per_prompt": a.num_images}
    scores = {name: getattr(a, name) for name in SCORES}
    ensemble = a.refiner is not None and not a.two_stage
    if ensemble:
        request: Any = EnsembleRequest(**first, **scores, **{name: getattr(a, name) for name in SWITCHES})
    else:
        request = TextToImageRequest(**first)
    second = ImageToImageRequest(**common | {"prompt": [a.prompt] * a.num_images}, **scores, strength=a.strength)
    plans: list[Any] = [(EnsemblePipeline if ensemble else TextToImagePipeline).plan(request)]
    plans += [ImageToImagePipeline.plan(second)] if a.two_stage else []
    for name, plan in zip(("base ", "refiner ") if a.two_stage else ("",), plans, strict=True):
        print(f"plan: {name}{plan}", flush=True)

    base, refiner = pipelines(a)
    if a.watermark:
        check_watermark(a.width or base.config.resolution, a.height or base.config.resolution)
    with torch.no_grad():
        pipe: Any = EnsemblePipeline(base, refiner) if ensemble and refiner is not None else base
        latents = drain(pipe, request, plans[0])
        if a.two_stage:
            latents = drain(refiner, replace(second, image=latents), plans[1])
        pictures = from_tensor(base.decode(latents))
    if a.watermark:
        pictures = [embed(picture) for picture in pictures]
    settings = record(a, base, refiner, plans) | {"size": "{}x{}".format(*pictures[0].size)}
    for seed, path, picture in zip(seeds, outs, pictures, strict=True):
        save_png(picture, path, settings | {"seed": seed})
    if a.num_images > 1:
        save_png(contact_sheet(pictures), out, settings | {"seed": a.seed, "images": a.num_images})
    if a.save_latents:
        save_latents(a.save_latents.resolve(), latents, 0.0)
    print(f"wrote {', '.join(str(path) for path in dict.fromkeys([*outs, out]))}")


def pipelines(a: argparse.Namespace) -> tuple[TextToImagePipeline, ImageToImagePipeline | None]:
    """Open the base, and the refiner where one is given; it decodes by the base's VAE."""
    options: dict[str, Any] = {"dtype": getattr(torch, a.dtype), "device": pick_device(a.device)}
    if a.low_memory:
        options["slot"] = Slot()
    if a.refiner is not None:  # a wrong file is found out before the base is read
        ImageToImagePipeline.open(a.refiner)
    base, refiner = TextToImagePipeline.from_single_file(a.base, **options), None
    if a.refiner is not None:
        refiner = ImageToImagePipeline.from_single_file(a.refiner, **options, vae=base.vae)
    if not a.low_memory:
        keep_freed_memory(base.device)
    for pipe in filter(None, (base, refiner)):
        assert pipe.checkpoint is not None
        print(f"{pipe.checkpoint.path.name}: {pipe.checkpoint.name}, {a.dtype} on {pipe.device}")
        if pipe.checkpoint.note:
            print(f"note: {pipe.checkpoint.note}")
    if a.lora:
        print("\n".join(put_on([pipe for pipe in (base, refiner) if pipe is not None], a.lora)))
    return base, refiner


def record(
    a: argparse.Namespace, base: TextToImagePipeline, refiner: ImageToImagePipeline | None, plans: list[Any]
) -> dict[str, Any]:
    """Everything that it takes to make the pictures again but their size and seed."""
    assert base.checkpoint is not None
    own = ["command", "dtype", "lora", "watermark", *SHARED, *BASE_ONLY]
    settings = {name: getattr(a, name) for name in own} | {"num_inference_steps": a.steps, "device": str(base.device)}
    settings |= {"plan": [str(plan) for plan in plans], "sigmas": [plan.grid.sigmas.tolist() for plan in plans]}
    settings |= identity(base.checkpoint)
    settings["lora_sha256"] = hashes(a.lora)
    zeros = a.negative_prompt is None and a.negative_prompt_2 is None
    sides = [f"base {'zeros' if zeros else 'negative prompt encoded'}"]
    if refiner is not None and refiner.checkpoint is not None:
        sides.append("refiner negative prompt encoded, empty where none is given")
        settings |= {"two_stage": a.two_stage} | {name: getattr(a, name) for name in (*SCORES, *SWITCHES)}
        if a.two_stage:
            settings["strength"] = 0.3 if a.strength is None else a.strength
        weights = {"file": refiner.checkpoint.path.name, "sha256": refiner.checkpoint.sha256()}
        settings["refiner_checkpoint"] = weights  # its VAE is not used: the base's decodes
    settings["unconditional"] = "; ".join(sides) if a.guidance_scale > 1 else "none"
    return settings


def drain(pipe: Any, request: Any, plan: Any) -> Tensor:
    """Run a plan under a progress bar, and return the final latents (b,4,h,w)."""
    for step in tqdm(pipe.steps(request), total=len(plan.grid.timesteps), unit="step", disable=None):
        latents = step.x
    return latents
