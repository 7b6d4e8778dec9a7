"""`sdxl-ref refine`: a photo and a prompt in, a refined picture out."""

import argparse
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm

from sdxl_ref.checkpoint import sha256_of
from sdxl_ref.commands.common import identity, keep_freed_memory, pick_device, sampling, writable
from sdxl_ref.images import fit, from_tensor, load_image, save_png
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline, ImageToImageRequest

SHARED = ["prompt", "negative_prompt", "strength", "strength_rule", "guidance_scale", "guidance_rescale", "sampler"]
SHARED += ["spacing", "karras", "aesthetic_score", "negative_aesthetic_score"]
MAX_PIXELS = 1024 * 1024  # the area SDXL was trained at; larger pictures are shrunk to it


def arguments(p: argparse.ArgumentParser) -> None:
    size = "shrunk to at most 1024x1024 pixels of area, then cropped around the centre to multiples of 8"
    p.add_argument("image", help=f"a picture of any kind and size: {size}")
    p.add_argument("--checkpoint", required=True, metavar="MODEL", help="file, folder, hub's repository, or pocket")
    p.add_argument("--strength", type=float, default=0.3, help="share of the steps that run, above 0 and at most 1")
    p.add_argument("--strength-rule", default="exact", help='"exact", or "sgm" as the official code counts')
    p.add_argument("--aesthetic-score", type=float, default=6.0, help="of the picture wanted, about 1 to 10")
    p.add_argument("--negative-aesthetic-score", type=float, default=2.5, help="of the picture to steer away from")
    sampling(p)


def run(a: argparse.Namespace) -> None:
    out = a.out or Path(f"{Path(a.image).stem}-refined.png")
    writable(out, a.save_latents, read=[a.image, a.checkpoint])
    device = pick_device(a.device)
    loaded = load_image(a.image)
    picture = fit(loaded, MAX_PIXELS)
    settings = {name: getattr(a, name) for name in SHARED} | {"num_inference_steps": a.steps}
    request = ImageToImageRequest(image=picture, generator=[torch.Generator().manual_seed(a.seed)], **settings)
    plan = ImageToImagePipeline.plan(request)  # before the weights are read
    if a.watermark:
        from sdxl_ref import watermark

        watermark.check(*picture.size)

    checkpoint = ImageToImagePipeline.open(a.checkpoint)
    idle = ThreadPool(1)  # of a daemon: what ends the command meanwhile does not wait for it
    hashing = idle.apply_async(identity, [checkpoint])  # later the file may have left the system's cache
    idle.close()
    pipe = ImageToImagePipeline.from_single_file(checkpoint, dtype=getattr(torch, a.dtype), device=device)
    made_by = hashing.get()
    keep_freed_memory(device)
    print(f"{checkpoint.path.name}: {checkpoint.name}, {a.dtype} on {device}")
    if checkpoint.note:
        print(f"note: {checkpoint.note}")
    if a.lora:
        from sdxl_ref.lora import hashes, put_on

        print("\n".join(put_on([pipe], a.lora)))
        settings["lora_sha256"] = hashes(a.lora)
    print(f"picture: {loaded.width}x{loaded.height}, used at {picture.width}x{picture.height}")
    print(f"plan: {plan}", flush=True)
    with torch.no_grad():
        for step in tqdm(pipe.steps(request), total=len(plan.grid.timesteps), unit="step", disable=None):
            latents, sigma = step.x, float(step.sigma)
        [result] = from_tensor(pipe.decode(latents))
    result = watermark.embed(result) if a.watermark else result
    settings |= {name: getattr(a, name) for name in ("command", "seed", "dtype", "lora", "watermark")}
    settings |= {"image": Path(a.image).name, "size": f"{picture.width}x{picture.height}", "device": str(device)}
    settings["image_sha256"] = sha256_of(Path(a.image)) if os.path.isfile(a.image) else None  # of an address
    settings |= {"sigmas": plan.grid.sigmas.tolist(), "timesteps": plan.grid.timesteps, **made_by}
    settings["unconditional"] = "negative prompt, encoded even where empty" if a.guidance_scale > 1 else "none"
    save_png(result, out, settings)
    if a.save_latents:
        from sdxl_ref.saving import save_latents

        save_latents(a.save_latents.resolve(), latents, sigma)
    print(f"wrote {out}")
