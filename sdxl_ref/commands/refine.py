"""`sdxl-ref refine`: a photo and a prompt in, a refined picture out: by the refiner, the base, or both in one run."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    read = [a.image, a.mask, a.checkpoint, a.base, a.refiner, a.vae, *a.embedding, *common.adapter_files(a.lora)]
    common.check_writable(out, a.save_latents, read=[source for source in read if source is not None])
    common.check_format(out)
    device = common.pick_device(a.device)
    photo = load_image(a.image)
    photo_sha256 = sha256_of(Path(a.image)) if os.path.isfile(a.image) else None  # of an address
    picture = fit(photo, a.max_pixels)
    mask = None if a.mask is None else common.masking().fitted(a.mask, photo, a.max_pixels)
    if a.watermark:
        common.watermarks().check(*picture.size)

    checkpoints = opened(a)
    request, settings = request_of(a, checkpoints, picture, mask)
    pipeline = pipeline_of(a)
    plan = pipeline.plan_for(request, *(checkpoint.defaults for checkpoint in checkpoints))  # before weights are read
    settings |= common.sampling_settings(request.completed(checkpoints[0].defaults))
    request, tiles_vae = fitted(a, checkpoints, request, (picture.height, picture.width), device)
    make_faster = common.faster(a, device)
    identities = common.identities(*checkpoints)  # later the file may have left the system's cache
    pipe = pipeline.from_pretrained(*checkpoints, **common.dtypes(a), device=device, prediction=a.prediction)
    settings |= made_by(identities(), plan)
    for checkpoint in checkpoints:
        common.say_what_runs(checkpoint, a.dtype, device)
    for model in pipe.models():
        model.tiles_vae = tiles_vae
    settings |= {"tile": request.tile, "tiles_vae": tiles_vae} | common.load_embeddings(pipe, a.embedding)
    settings |= common.put_on(pipe, a.lora) | {"device": str(device)} | make_faster(pipe)
    print(f"picture: {photo.width}x{photo.height}, used at {picture.width}x{picture.height}")
    print(f"plan: {plan}", flush=True)
    latents = pipe.run(replace(request, output_type="latent"))  # (1,4,h,w)
    with torch.no_grad():
        images = pipe.decode(latents)
    if mask is not None:
        images = common.masking().paste(images, to_tensor(picture), common.masking().read(mask))
    [refined] = from_tensor(images)
    if a.watermark:
        refined = common.watermarks().embed(refined)

    settings |= {name: getattr(a, name) for name in ("command", "seed", "dtype", "vae_dtype", "watermark")}
    settings |= {"image": Path(a.image).name, "image_sha256": photo_sha256, "size": f"{picture.width}x{picture.height}"}
    settings |= {"sigmas": plan.grid.sigmas.tolist(), "timesteps": plan.grid.timesteps}
    settings |= {"prediction": pipe.config.prediction, "unconditional": "none"}
    settings |= {"unconditional": pipe.unconditional(request)} if request.guided else {}
    common.save_picture(refined, out, settings)
    for checkpoint in checkpoints:
        common.say_changes(checkpoint)
    common.save_latents(a.save_latents, latents, float(plan.grid.sigmas[-1]))
    print(f"wrote {out}")


def check(a: argparse.Namespace) -> None:
    """InputError unless the options name one model, or a base and a refiner."""
    if (a.checkpoint is None) == (a.base is None and a.refiner is None) or (a.base is None) != (a.refiner is None):
        raise InputError("name the model by --checkpoint, or both of an ensemble by --base and --refiner")
    if a.max_pixels < MULTIPLE**2:
        raise InputError(f"--max-pixels must be at least {MULTIPLE**2}, found {a.max_pixels}")
    for name in common.SWITCHES:
        if a.refiner is None and getattr(a, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is the ensemble's: give --base and --refiner, or leave it out"
            )


def opened(a: argparse.Namespace) -> Sequence[Checkpoint]:
    """The models, without their weights: one, or base and refiner."""
    if a.checkpoint is not None:
        return [ImageToImagePipeline.open(a.checkpoint, a.variant, vae=a.vae)]
    return common.experts().opened(a.base, a.refiner, a.variant, a.vae)


def pipeline_of(a: argparse.Namespace) -> Any:
    """The class that runs them."""
    return ImageToImagePipeline if a.checkpoint is not None else common.experts().EnsemblePipeline


def request_of(
    a: argparse.Namespace, checkpoints: Sequence[Checkpoint], picture: Image.Image, mask: Image.Image | None
) -> tuple[Any, dict[str, Any]]:
    """The request, and what the picture's settings say of it. InputError for what the model has no use for."""
    names = (*SHARED, *OWN, *SCORES, *BASE_ONLY, *(common.SWITCHES if a.refiner is not None else ()))
    settings = {name: getattr(a, name) for name in names} | {"num_inference_steps": a.steps}
    if checkpoints[-1].config.kind == "refiner":
        settings |= {name: score for name, score in SCORES.items() if settings[name] is None}
    generator = [torch.Generator().manual_seed(a.seed)]
    request = pipeline_of(a).request_type(image=picture, mask_image=mask, generator=generator, **settings)
    if a.checkpoint is not None:
        refuse_unusable(checkpoints[0].config.kind, request)
    if mask is not None:
        settings |= {"mask": Path(a.mask).name, "mask_sha256": sha256_of(Path(a.mask)), "mask_changes": "both sides"}
    return request, settings


def made_by(identities: Sequence[dict[str, Any]], plan: Any) -> dict[str, Any]:
    """What the picture's settings say of the files."""
    first, *others = identities
    return first if not others else first | common.experts().refiner_settings(others[0], plan.switch)
