"""`sdxl-ref refine`: a photo and a prompt in, a refined picture out."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from sdxl_ref.commands import common
from sdxl_ref.commands.common import SHARED
from sdxl_ref.pictures.images import fit, from_tensor, load_image
from sdxl_ref.pipelines.calling import watermarks
from sdxl_ref.pipelines.image_to_image import STRENGTH, ImageToImagePipeline, ImageToImageRequest
from sdxl_ref.pipelines.pipeline import NEGATIVE_SCORE, SCORE
from sdxl_ref.weights.tensor_files import sha256_of

OWN = ("strength", "strength_rule", "aesthetic_score", "negative_aesthetic_score")
MAX_PIXELS = 1024 * 1024  # the area SDXL was trained at; larger pictures are shrunk to it


def arguments(p: argparse.ArgumentParser) -> None:
    size = "shrunk to at most 1024x1024 pixels of area, then cropped around the centre to multiples of 8"
    p.add_argument("image", help=f"a picture of any kind and size: {size}")
    p.add_argument("--checkpoint", required=True, metavar="MODEL", help="file, folder, hub's repository, or pocket")
    common.add_request_options(p, ImageToImageRequest, *OWN)
    p.set_defaults(strength=STRENGTH, aesthetic_score=SCORE, negative_aesthetic_score=NEGATIVE_SCORE)
    common.add_sampling_options(p)


def run(a: argparse.Namespace) -> None:
    out = a.out or Path(f"{Path(a.image).stem}-refined.png")
    common.check_writable(out, a.save_latents, read=[a.image, a.checkpoint, a.vae, *common.adapter_files(a.lora)])
    common.check_format(out)
    device = common.pick_device(a.device)
    photo = load_image(a.image)
    photo_sha256 = sha256_of(Path(a.image)) if os.path.isfile(a.image) else None  # of an address
    picture = fit(photo, MAX_PIXELS)
    settings = {name: getattr(a, name) for name in (*SHARED, *OWN)} | {"num_inference_steps": a.steps}
    request = ImageToImageRequest(image=picture, generator=[torch.Generator().manual_seed(a.seed)], **settings)
    if a.watermark:
        watermarks().check(*picture.size)

    checkpoint = ImageToImagePipeline.open(a.checkpoint, a.variant, vae=a.vae)
    plan = ImageToImagePipeline.plan_for(request, checkpoint.defaults)  # before the weights are read
    settings |= common.sampling_settings(request.completed(checkpoint.defaults))
    make_faster = common.faster(a, device)
    identities = common.identities(checkpoint)  # later the file may have left the system's cache
    dtypes = common.dtypes(a)
    pipe = ImageToImagePipeline.from_pretrained(checkpoint, **dtypes, device=device, prediction=a.prediction)
    [made_by] = identities()
    common.say_what_runs(checkpoint, a.dtype, device)
    adapters = common.put_on(pipe, a.lora)
    settings |= {"device": str(device)} | make_faster(pipe)
    print(f"picture: {photo.width}x{photo.height}, used at {picture.width}x{picture.height}")
    print(f"plan: {plan}", flush=True)
    latents = pipe.run(replace(request, output_type="latent"))  # (1,4,h,w)
    with torch.no_grad():
        [refined] = from_tensor(pipe.decode(latents))
    if a.watermark:
        refined = watermarks().embed(refined)

    settings |= {name: getattr(a, name) for name in ("command", "seed", "dtype", "vae_dtype", "watermark")} | adapters
    settings |= {"image": Path(a.image).name, "image_sha256": photo_sha256, "size": f"{picture.width}x{picture.height}"}
    settings |= {"sigmas": plan.grid.sigmas.tolist(), "timesteps": plan.grid.timesteps, **made_by}
    settings["prediction"] = pipe.config.prediction
    settings["unconditional"] = "none" if not request.guided else pipe.unconditional(request)
    common.save_picture(refined, out, settings)
    common.say_changes(checkpoint)
    common.save_latents(a.save_latents, latents, float(plan.grid.sigmas[-1]))
    print(f"wrote {out}")
