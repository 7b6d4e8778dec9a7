"""`sdxl-ref generate`: a prompt in, pictures out, by the base alone, the ensemble, or the base and then SDEdit."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdxl_ref.commands import common, experts
from sdxl_ref.commands.common import SHARED, SWITCHES
from sdxl_ref.commands.room import fitted
from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import from_tensor
from sdxl_ref.pictures.sheets import contact_sheet
from sdxl_ref.pictures.watermark import check as check_watermark
from sdxl_ref.pictures.watermark import embed
from sdxl_ref.pipelines.ensemble import EnsemblePipeline, EnsembleRequest
from sdxl_ref.pipelines.first_noise import check_size
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.plans import STRENGTH
from sdxl_ref.pipelines.request import Request
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.offload import Offload

BASE_ONLY = ("prompt_2", "negative_prompt_2", "height", "width")
SCORES = ("aesthetic_score", "negative_aesthetic_score")
EXAMPLES = """examples:
  base alone:   sdxl-ref generate --base BASE --prompt "a red barn"
  ensemble:     sdxl-ref generate --base BASE --refiner REFINER --prompt "a red barn" --karras
  two stages:   sdxl-ref generate --base BASE --refiner REFINER --prompt "a red barn" --two-stage --strength 0.3

BASE and REFINER are safetensors files in the official layout, folders in diffusers' layout, repositories of the hub by
their id, or "pocket": the small pair, of 128 pixels, that is installed with this package. The ensemble is one run: the
base denoises first, the refiner from the hand-off on. --switch counts training steps (noise levels), not sampling
steps: with --karras 0.8 can mean 12 of 20 steps; the plan that is printed says. Without --out: generated.png, or
generated-2.png where that is there.
"""


class Job(NamedTuple):
    """A run, or two, that nothing but the weights is missing of. `size`: (width, height) of the pictures."""

    checkpoints: Sequence[Checkpoint]
    first: Request
    second: Request
    plans: list[Any]
    size: tuple[int, int]
    tiles_vae: bool

    @property
    def plan(self) -> str:
        """A line for each run."""
        if len(self.plans) == 1:
            return str(self.plans[0])
        return "\n".join(f"{name} {plan}" for name, plan in zip(("base", "refiner"), self.plans, strict=True))


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EXAMPLES
    p.add_argument("--base", required=True, metavar="MODEL", help="file, folder, repository of the hub, or pocket")
    p.add_argument("--refiner", metavar="MODEL", help="finish with it: as an ensemble, or see --two-stage")
    common.add_request_options(p, EnsembleRequest, *BASE_ONLY, *SCORES)
    common.add_switch_options(p)
    p.add_argument("--two-stage", action="store_true", help="a whole run of the base, then SDEdit by the refiner")
    p.add_argument("--strength", type=float, help="share of the steps that the second stage runs (0.3)")
    p.add_argument("--num-images", type=int, default=1, help="one file each, seeds counted up, and a contact sheet")
    p.add_argument("--low-memory", action="store_true", help="one set of weights in memory at a time")
    common.add_sampling_options(p)


def run(a: argparse.Namespace) -> None:
    check(a)
    out = a.out or common.free_name(Path("generated.png"), a.num_images)
    outs = common.names_of_several(out, a.num_images)
    common.check_writable(*dict.fromkeys((*outs, out)), a.save_latents, read=sources(a))
    common.check_format(out)
    device = common.pick_device(a.device)
    job = planned(a, opened(a), device)
    for plan in job.plan.split("\n"):
        print(f"plan: {plan}", flush=True)

    make_faster = common.faster(a, device)
    pipe, identities = load(a, job, device)
    adapters = common.load_embeddings(pipe, a.embedding) | common.put_on(pipe, a.lora) | make_faster(pipe)
    pictures, latents, settings = paint(a, job, pipe, identities)
    settings |= adapters
    for seed, path, picture in zip(seeds(a), outs, pictures, strict=True):
        common.save_picture(picture, path, settings | {"seed": seed})
    if a.num_images > 1:
        common.save_picture(contact_sheet(pictures), out, settings | {"images": a.num_images})
    for checkpoint in job.checkpoints:
        common.say_changes(checkpoint)
    common.save_latents(a.save_latents, latents, 0.0)
    print(f"wrote {', '.join(str(path) for path in dict.fromkeys([*outs, out]))}")


def check(a: argparse.Namespace) -> None:
    """InputError for options that do not go together."""
    for name in ("two_stage", *SCORES, *SWITCHES):
        if getattr(a, name) not in (None, False) and a.refiner is None:
            raise InputError(f"--{name.replace('_', '-')} is the refiner's: give --refiner FILE too, or leave it out")
    if a.compile and a.low_memory:
        raise InputError("--compile wants all networks in memory, --low-memory does not: give one of them")
    if a.strength is not None and not a.two_stage:
        raise InputError("--strength is that of the second stage: give --two-stage too, or leave it out")
    if a.two_stage and any(getattr(a, name) is not None for name in SWITCHES):
        raise InputError("--switch… is the ensemble's, --two-stage has none: give one of them")
    if a.out is not None and not a.out.name:
        raise InputError(f"--out must name a file, found {a.out}")
    if not 1 <= a.num_images <= 1000:
        raise InputError(f"--num-images must be from 1 to 1000, found {a.num_images}")


def sources(a: argparse.Namespace) -> list[object]:
    """All that a run reads; None for what it does not."""
    models = [a.base] if a.refiner in (None, a.base) else [a.base, a.refiner]
    return [*models, a.vae, *a.embedding, *common.adapter_files(a.lora)]


def opened(a: argparse.Namespace) -> Sequence[Checkpoint]:
    """The models, without their weights: the base, and the refiner where there is one."""
    return experts.opened(a.base, a.refiner, a.variant, a.vae)


def inputs_of(a: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    """What a run reads but its weights: nothing but the models."""
    return checkpoints


def seeds(a: argparse.Namespace) -> list[int]:
    """One for each picture, counted up."""
    return [(a.seed + i) % 2**64 for i in range(a.num_images)]


def planned(a: argparse.Namespace, checkpoints: Sequence[Checkpoint], device: torch.device) -> Job:
    """The requests and their plans, without the weights. InputError for what cannot be run."""
    first, second = requests(a, [torch.Generator().manual_seed(seed) for seed in seeds(a)])
    check_size(first)
    plans = plans_of(a, checkpoints, first, second)
    resolution = checkpoints[0].config.resolution
    size = (a.width or resolution, a.height or resolution)
    if a.watermark:
        check_watermark(*size)
    first, tiles_vae = fitted(a, checkpoints, first, size[::-1], device)
    return Job(checkpoints, first, replace(second, tile=first.tile), plans, size, tiles_vae)


def requests(a: argparse.Namespace, generators: list[torch.Generator]) -> tuple[Request, Request]:
    """Of the first run, base or ensemble, and of the second stage, whose picture is the first one's. Both end in
    latents."""
    common: dict[str, Any] = {name: getattr(a, name) for name in SHARED}
    common |= {"num_inference_steps": a.steps, "generator": generators, "output_type": "latent"}
    scores = {name: getattr(a, name) for name in SCORES}
    first = common | {name: getattr(a, name) for name in BASE_ONLY} | {"num_images_per_prompt": a.num_images}
    strength = STRENGTH if a.strength is None else a.strength
    second = common | scores | {"prompt": [a.prompt] * a.num_images, "strength": strength}
    if a.refiner is None or a.two_stage:
        return Request(**first), Request(**second)
    switches = {name: getattr(a, name) for name in SWITCHES}
    return EnsembleRequest(**first, **scores, **switches), Request(**second)


def plans_of(a: argparse.Namespace, files: Sequence[Checkpoint], first: Request, second: Request) -> list[Any]:
    """The plans of the runs, one or two."""
    defaults = [file.defaults for file in files]
    if isinstance(first, EnsembleRequest):
        return [EnsemblePipeline.plan_for(first, *defaults)]
    plans: list[Any] = [TextToImagePipeline.plan_for(first, defaults[0])]
    if a.two_stage:
        plans.append(ImageToImagePipeline.plan_for(second, defaults[1]))
    return plans


def load(a: argparse.Namespace, job: Job, device: torch.device) -> tuple[Any, Sequence[dict[str, Any]]]:
    """The pipeline with its weights, and what settings say of their files; says what runs. The base's VAE decodes."""
    options: dict[str, Any] = {"device": device, "prediction": a.prediction} | common.dtypes(a)
    if a.low_memory:
        options["offload"] = Offload(device)
    identities = common.identities(*job.checkpoints)
    pipe: Any = TextToImagePipeline.from_pretrained(job.checkpoints[0], **options)
    if len(job.checkpoints) == 2:
        refiner = ImageToImagePipeline.from_pretrained(job.checkpoints[1], **options, vae=pipe.vae)
        pipe = EnsemblePipeline(pipe, refiner)
    for checkpoint in job.checkpoints:
        common.say_what_runs(checkpoint, a.dtype, device)
    return pipe, identities()


def paint(a: argparse.Namespace, job: Job, pipe: Any, identities: Sequence[dict[str, Any]]) -> common.Painted:
    """Run a job: its pictures, the final latents (b,4,h,w), and the settings but those of adapters and packing."""
    return finished(a, job, pipe, identities, denoised(a, job, pipe))


def denoised(a: argparse.Namespace, job: Job, pipe: Any) -> torch.Tensor:
    """The final latents (b,4,h,w) of a job, or of several whose requests are one."""
    for model in pipe.models():
        model.tiles_vae = job.tiles_vae
    latents = (pipe.base if a.two_stage else pipe).run(job.first)  # (b,4,h,w)
    return pipe.refiner.run(replace(job.second, image=latents)) if a.two_stage else latents


def finished(
    a: argparse.Namespace, job: Job, pipe: Any, identities: Sequence[dict[str, Any]], latents: torch.Tensor
) -> common.Painted:
    """What `paint` returns, of a job's latents (b,4,h,w)."""
    with torch.no_grad():
        pictures = from_tensor(pipe.decode(latents))
    if a.watermark:
        pictures = [embed(picture) for picture in pictures]
    return pictures, latents, record(a, job, pipe, identities)


def record(a: argparse.Namespace, job: Job, pipe: Any, identities: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that it takes to make the pictures again but their adapters. The seed is the first one's."""
    base, *others = pipe.models()
    own = ("command", "seed", "dtype", "vae_dtype", "watermark", *SHARED, *BASE_ONLY)
    settings = {name: getattr(a, name) for name in own} | {"num_inference_steps": a.steps, "device": str(base.device)}
    settings |= {"plan": [str(plan) for plan in job.plans], "tile": job.first.tile, "tiles_vae": job.tiles_vae}
    settings |= identities[0] | {"prediction": base.config.prediction}
    sides = [f"base {base.unconditional(job.first)}"]
    for refiner in others:
        sides.append(f"refiner {refiner.unconditional(job.second)}")
        settings["refiner_prediction"] = refiner.config.prediction
        settings |= {"two_stage": a.two_stage} | {name: getattr(a, name) for name in (*SCORES, *SWITCHES)}
        if a.two_stage:
            settings["strength"] = STRENGTH if a.strength is None else a.strength
        settings |= experts.refiner_settings(identities[1], None if a.two_stage else job.plans[0].switch)
    settings["unconditional"] = "; ".join(sides) if job.first.guided else "none"
    settings |= common.sampling_settings(job.first.completed(job.checkpoints[0].defaults))
    settings["sigmas"] = [plan.grid.sigmas.tolist() for plan in job.plans]
    return settings | {"size": "{}x{}".format(*job.size)}
