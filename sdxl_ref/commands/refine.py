"""`sdxl-ref refine`: a photo and a prompt in, a refined picture out: by the refiner, the base, or both in one run."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdxl_ref.commands import common
from sdxl_ref.commands.common import SHARED
from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import fit, from_tensor, load_image, to_tensor
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


class Inputs(NamedTuple):
    """What a run reads but its weights. The picture is the photo after the size rule, and the mask has its size."""

    photo: Image.Image
    photo_sha256: str | None
    picture: Image.Image
    mask: Image.Image | None
    checkpoints: Sequence[Checkpoint]


class Job(NamedTuple):
    """A run that nothing but the weights is missing of. `size`: (width, height) of its picture."""

    request: Any
    plan: Any
    settings: dict[str, Any]
    size: tuple[int, int]


def arguments(p: argparse.ArgumentParser) -> None:
    size = "shrunk to at most 1024x1024 pixels of area, then cropped around the centre to multiples of 8"
    p.epilog = EXAMPLES
    p.add_argument("image", help=f"a picture of any kind and size: {size}")
    p.add_argument("--checkpoint", metavar="MODEL", help="refiner or base: file, folder, hub's repository, or pocket")
    p.add_argument("--base", metavar="MODEL", help="with --refiner, in place of --checkpoint: both in one run")
    p.add_argument("--refiner", metavar="MODEL", help="takes over from the base: see --switch of generate")
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
    inputs = inputs_of(a)
    job = planned(a, inputs)
    loaded = load(a, inputs, device)
    adapters = common.put_on(loaded.pipe, a.lora) | loaded.make_faster(loaded.pipe)
    print(f"picture: {inputs.photo.width}x{inputs.photo.height}, used at {'{}x{}'.format(*job.size)}")
    print(f"plan: {job.plan}", flush=True)
    [refined], latents, settings = paint(a, inputs, job, loaded)
    common.save_picture(refined, out, settings | adapters)
    for checkpoint in inputs.checkpoints:
        common.say_changes(checkpoint)
    common.save_latents(a.save_latents, latents, float(job.plan.grid.sigmas[-1]))
    print(f"wrote {out}")


def check(a: argparse.Namespace) -> None:
    """InputError unless the options name one model, or a base and a refiner."""
    if (a.checkpoint is None) == (a.base is None and a.refiner is None) or (a.base is None) != (a.refiner is None):
        raise InputError("name the model by --checkpoint, or both of an ensemble by --base and --refiner")
    for name in common.SWITCHES:
        if a.refiner is None and getattr(a, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is the ensemble's: give --base and --refiner, or leave it out"
            )


def sources(a: argparse.Namespace) -> list[object]:
    """All that a run reads."""
    read = [a.image, a.mask, a.checkpoint, a.base, a.refiner, a.vae, *common.adapter_files(a.lora)]
    return [source for source in read if source is not None]


def inputs_of(a: argparse.Namespace) -> Inputs:
    """Read the pictures and open the models. InputError for what cannot be used, before any weight is read."""
    photo = load_image(a.image)
    photo_sha256 = sha256_of(Path(a.image)) if os.path.isfile(a.image) else None  # of an address
    picture = fit(photo, MAX_PIXELS)
    mask = None if a.mask is None else common.masking().fitted(a.mask, photo, MAX_PIXELS)
    if a.watermark:
        common.watermarks().check(*picture.size)
    return Inputs(photo, photo_sha256, picture, mask, opened(a))


def opened(a: argparse.Namespace) -> Sequence[Checkpoint]:
    """The models, without their weights: one, or base and refiner."""
    if a.checkpoint is not None:
        return [ImageToImagePipeline.open(a.checkpoint, a.variant, vae=a.vae)]
    return common.experts().opened(a.base, a.refiner, a.variant, a.vae)


def pipeline_of(a: argparse.Namespace) -> Any:
    """The class that runs them."""
    return ImageToImagePipeline if a.checkpoint is not None else common.experts().EnsemblePipeline


def planned(a: argparse.Namespace, inputs: Inputs) -> Job:
    """The request and its plan, without the weights. InputError for what cannot be run."""
    request, settings = request_of(a, inputs)
    defaults = [checkpoint.defaults for checkpoint in inputs.checkpoints]
    plan = pipeline_of(a).plan_for(request, *defaults)
    settings |= common.sampling_settings(request.completed(defaults[0]))
    return Job(request, plan, settings, inputs.picture.size)


def load(a: argparse.Namespace, inputs: Inputs, device: torch.device) -> common.Loaded:
    """Read the weights, and say what runs."""
    make_faster = common.faster(a, device)
    identities = common.identities(*inputs.checkpoints)  # later the file may have left the system's cache
    options = common.dtypes(a) | {"device": device, "prediction": a.prediction}
    pipe = pipeline_of(a).from_pretrained(*inputs.checkpoints, **options)
    loaded = common.Loaded(pipe, device, identities(), make_faster)
    for checkpoint in inputs.checkpoints:
        common.say_what_runs(checkpoint, a.dtype, device)
    return loaded


def paint(a: argparse.Namespace, inputs: Inputs, job: Job, loaded: common.Loaded) -> common.Painted:
    """Run a job; the settings are all but those of the adapters and of what was made faster."""
    pipe = loaded.pipe
    latents = pipe.run(replace(job.request, output_type="latent"))  # (1,4,h,w)
    with torch.no_grad():
        images = pipe.decode(latents)
    if inputs.mask is not None:
        images = common.masking().paste(images, to_tensor(inputs.picture), common.masking().read(inputs.mask))
    pictures = from_tensor(images)
    if a.watermark:
        pictures = [common.watermarks().embed(picture) for picture in pictures]
    settings = job.settings | made_by(loaded.identities, job.plan) | {"device": str(loaded.device)}
    settings |= {name: getattr(a, name) for name in ("command", "seed", "dtype", "vae_dtype", "watermark")}
    settings |= {"image": Path(a.image).name, "image_sha256": inputs.photo_sha256, "size": "{}x{}".format(*job.size)}
    settings |= {"sigmas": job.plan.grid.sigmas.tolist(), "timesteps": job.plan.grid.timesteps}
    settings |= {"prediction": pipe.config.prediction, "unconditional": "none"}
    settings |= {"unconditional": pipe.unconditional(job.request)} if job.request.guided else {}
    return common.Painted(pictures, latents, settings)


def request_of(a: argparse.Namespace, inputs: Inputs) -> tuple[Any, dict[str, Any]]:
    """The request, and what the picture's settings say of it. InputError for what the model has no use for."""
    names = (*SHARED, *OWN, *SCORES, *BASE_ONLY, *(common.SWITCHES if a.refiner is not None else ()))
    settings = {name: getattr(a, name) for name in names} | {"num_inference_steps": a.steps}
    if inputs.checkpoints[-1].config.kind == "refiner":
        settings |= {name: score for name, score in SCORES.items() if settings[name] is None}
    generator = [torch.Generator().manual_seed(a.seed)]
    pictures = {"image": inputs.picture, "mask_image": inputs.mask}
    request = pipeline_of(a).request_type(**pictures, generator=generator, **settings)
    if a.checkpoint is not None:
        refuse_unusable(inputs.checkpoints[0].config.kind, request)
    if inputs.mask is not None:
        settings |= {"mask": Path(a.mask).name, "mask_sha256": sha256_of(Path(a.mask)), "mask_changes": "both sides"}
    return request, settings


def made_by(identities: Sequence[dict[str, Any]], plan: Any) -> dict[str, Any]:
    """What the picture's settings say of the files."""
    first, *others = identities
    return first if not others else first | common.experts().refiner_settings(others[0], plan.switch)
