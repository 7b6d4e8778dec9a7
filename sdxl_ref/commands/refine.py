"""`sdxl-ref refine`: a photo and a prompt in, a refined picture out: by the refiner, the base, or both in one run."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdxl_ref.commands import common
from sdxl_ref.commands.common import SHARED
from sdxl_ref.commands.room import fitted
from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import MULTIPLE, fit, from_tensor, load_image, to_tensor
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.pipeline import NEGATIVE_SCORE, SCORE, refuse_unusable
from sdxl_ref.pipelines.plans import STRENGTH
from sdxl_ref.pipelines.request import Request
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.tensor_files import sha256_of

OWN = ("strength", "strength_rule")
SCORES = {"aesthetic_score": SCORE, "negative_aesthetic_score": NEGATIVE_SCORE}
BASE_ONLY = ("prompt_2", "negative_prompt_2")
MAX_PIXELS = 1024 * 1024  # the area SDXL was trained at; larger pictures are shrunk to it
EXAMPLES = """examples:
  refiner:   sdxl-ref refine photo.jpg --checkpoint REFINER --prompt "a cup of coffee"
  base:      sdxl-ref refine photo.jpg --checkpoint BASE --prompt "a cup of coffee" --strength 0.6
  ensemble:  sdxl-ref refine photo.jpg --base BASE --refiner REFINER --prompt "a cup of coffee" --strength 0.6
  a part:    sdxl-ref refine photo.jpg --mask cup.png --checkpoint BASE --prompt "a blue cup" --strength 0.9
"""


class Job(NamedTuple):
    """What a run reads but its weights, and, where it is planned, all that it takes besides them.

    The picture is the photo by the size rule, and the mask has its size.
    """

    photo: Image.Image
    picture: Image.Image
    mask: Image.Image | None
    checkpoints: Sequence[Checkpoint]
    request: Any = None
    plan: Any = None
    settings: Mapping[str, Any] = {}


def arguments(p: argparse.ArgumentParser) -> None:
    size = "shrunk to --max-pixels, 1024x1024, of area, then cropped around the centre to multiples of 8"
    p.epilog = EXAMPLES
    p.add_argument("image", help=f"a picture of any kind and size: {size}")
    p.add_argument("--checkpoint", metavar="MODEL", help="refiner or base: file, folder, hub's repository, or pocket")
    p.add_argument("--base", metavar="MODEL", help="with --refiner, in place of --checkpoint: both in one run")
    p.add_argument("--refiner", metavar="MODEL", help="takes over from the base: see --switch of generate")
    p.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="shrink a picture of more than this area to it")
    p.add_argument("--mask", metavar="FILE", help="a picture of its size: white is painted, black stays")
    common.add_request_options(p, Request, *OWN, *SCORES, *BASE_ONLY)
    common.add_switch_options(p)
    p.set_defaults(strength=STRENGTH)
    common.add_sampling_options(p)


def run(a: argparse.Namespace) -> None:
    out = a.out or common.free_name(Path(f"{Path(a.image).stem}-refined.png"))
    check(a)
    common.check_writable(out, a.save_latents, read=sources(a))
    common.check_format(out)
    device = common.pick_device(a.device)
    job = planned(a, inputs_of(a, opened(a)), device)
    make_faster = common.faster(a, device)
    pipe, identities = load(a, job, device)
    adapters = common.load_embeddings(pipe, a.embedding) | common.put_on(pipe, a.lora) | make_faster(pipe)
    print(f"picture: {job.photo.width}x{job.photo.height}, used at {job.settings['size']}")
    print(f"plan: {job.plan}", flush=True)
    [refined], latents, settings = paint(a, job, pipe, identities)
    common.save_picture(refined, out, settings | adapters)
    for checkpoint in job.checkpoints:
        common.say_changes(checkpoint)
    common.save_latents(a.save_latents, latents, float(job.plan.grid.sigmas[-1]))
    print(f"wrote {out}")


def check(a: argparse.Namespace) -> None:
    """InputError unless the options name one model, or a base and a refiner."""
    if (a.checkpoint is None) == (a.base is None and a.refiner is None) or (a.base is None) != (a.refiner is None):
        raise InputError("name the model by --checkpoint, or both of an ensemble by --base and --refiner")
    if a.max_pixels < MULTIPLE**2:
        raise InputError(f"--max-pixels must be at least {MULTIPLE**2}, found {a.max_pixels}")
    switches = [f"--{name.replace('_', '-')}" for name in common.SWITCHES if getattr(a, name) is not None]
    if a.refiner is None and switches:
        raise InputError(f"{switches[0]} is the ensemble's: give --base and --refiner, or leave it out")


def sources(a: argparse.Namespace) -> list[object]:
    """All that a run reads; None for what it does not."""
    return [a.image, a.mask, a.checkpoint, a.base, a.refiner, a.vae, *a.embedding, *common.adapter_files(a.lora)]


def inputs_of(a: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> Job:
    """A job that is not planned yet, on these models. InputError for pictures that cannot be used."""
    photo = load_image(a.image)
    picture = fit(photo, a.max_pixels)
    mask = None if a.mask is None else common.masking().fitted(a.mask, photo, a.max_pixels)
    if a.watermark:
        common.watermarks().check(*picture.size)
    settings = {"image": Path(a.image).name, "image_sha256": hash_of(a.image)}
    if mask is not None:
        settings |= {"mask": Path(a.mask).name, "mask_sha256": hash_of(a.mask), "mask_changes": "both sides"}
    return Job(photo, picture, mask, checkpoints, settings=settings)


def hash_of(source: str) -> str | None:
    """Of a picture's file; None of an address."""
    return sha256_of(Path(source)) if os.path.isfile(source) else None


def opened(a: argparse.Namespace) -> Sequence[Checkpoint]:
    """The models, without their weights: one, or base and refiner."""
    if a.checkpoint is not None:
        return [ImageToImagePipeline.open(a.checkpoint, a.variant, vae=a.vae)]
    return common.experts().opened(a.base, a.refiner, a.variant, a.vae)


def pipeline_of(a: argparse.Namespace) -> Any:
    """The class that runs them."""
    return ImageToImagePipeline if a.checkpoint is not None else common.experts().EnsemblePipeline


def planned(a: argparse.Namespace, job: Job, device: torch.device) -> Job:
    """With its request, plan and settings. InputError for what the model has no use for, or what cannot be run."""
    names = (*SHARED, *OWN, *SCORES, *BASE_ONLY, *(common.SWITCHES if a.refiner is not None else ()))
    settings = {name: getattr(a, name) for name in names} | {"num_inference_steps": a.steps}
    if job.checkpoints[-1].config.kind == "refiner":
        settings |= {name: score for name, score in SCORES.items() if settings[name] is None}
    generator = [torch.Generator().manual_seed(a.seed)]
    request = pipeline_of(a).request_type(image=job.picture, mask_image=job.mask, generator=generator, **settings)
    if a.checkpoint is not None:
        refuse_unusable(job.checkpoints[0].config.kind, request)
    plan = pipeline_of(a).plan_for(request, *(checkpoint.defaults for checkpoint in job.checkpoints))
    settings |= common.sampling_settings(request.completed(job.checkpoints[0].defaults))
    settings |= {name: getattr(a, name) for name in ("command", "seed", "dtype", "vae_dtype", "watermark")}
    settings |= {**job.settings, "size": "{}x{}".format(*job.picture.size)}
    settings |= {"sigmas": plan.grid.sigmas.tolist(), "timesteps": plan.grid.timesteps}
    request, tiles_vae = fitted(a, job.checkpoints, request, job.picture.size[::-1], device)
    settings |= {"tile": request.tile, "tiles_vae": tiles_vae}
    return job._replace(request=request, plan=plan, settings=settings)


def load(a: argparse.Namespace, job: Job, device: torch.device) -> tuple[Any, Sequence[dict[str, Any]]]:
    """The pipeline with its weights, and what settings say of their files; says what runs."""
    identities = common.identities(*job.checkpoints)  # later the file may have left the system's cache
    pipe = pipeline_of(a).from_pretrained(*job.checkpoints, **common.dtypes(a), device=device, prediction=a.prediction)
    for checkpoint in job.checkpoints:
        common.say_what_runs(checkpoint, a.dtype, device)
    return pipe, identities()


def paint(a: argparse.Namespace, job: Job, pipe: Any, identities: Sequence[dict[str, Any]]) -> common.Painted:
    """Run a job: its picture, the final latents (1,4,h,w), and the settings but those of adapters and packing."""
    return finished(a, job, pipe, identities, denoised(a, job, pipe))


def denoised(a: argparse.Namespace, job: Job, pipe: Any) -> torch.Tensor:
    """The final latents (b,4,h,w) of a job, or of several whose requests are one."""
    for model in pipe.models():
        model.tiles_vae = job.settings["tiles_vae"]
    return pipe.run(replace(job.request, output_type="latent"))


def finished(
    a: argparse.Namespace, job: Job, pipe: Any, identities: Sequence[dict[str, Any]], latents: torch.Tensor
) -> common.Painted:
    """What `paint` returns, of a job's latents (1,4,h,w)."""
    with torch.no_grad():
        images = pipe.decode(latents)
    if job.mask is not None:
        images = common.masking().paste(images, to_tensor(job.picture), common.masking().read(job.mask))
    pictures = from_tensor(images)
    if a.watermark:
        pictures = [common.watermarks().embed(picture) for picture in pictures]
    negative = pipe.unconditional(job.request) if job.request.guided else "none"
    made = identities[0] | {"device": str(pipe.device), "prediction": pipe.config.prediction, "unconditional": negative}
    if a.refiner is not None:
        made |= common.experts().refiner_settings(identities[1], job.plan.switch)
    return pictures, latents, {**job.settings, **made}
