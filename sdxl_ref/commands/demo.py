"""`sdxl-ref demo`: the pocket pair paints a few prompts and refines a degraded scene, on one contact sheet."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from sdxl_ref import __version__
from sdxl_ref.commands.common import seed, writable
from sdxl_ref.ecosystem import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.images import from_tensor, save_png
from sdxl_ref.pipelines.ensemble import EnsembleRequest
from sdxl_ref.pocket.judge import Marks, judge
from sdxl_ref.pocket.scenes import Scene, Thing, draw
from sdxl_ref.sheets import contact_sheet

SCENES = (
    Scene((Thing("red", "circle"),), None, "white", "plain"),
    Scene((Thing("green", "triangle"),), None, "gray", "striped"),
    Scene((Thing("yellow", "cross"),), None, "black", "checkered"),
    Scene((Thing("red", "square"), Thing("blue", "circle")), "above", "white", "plain"),  # never trained on
    Scene((Thing("cyan", "circle"), Thing("pink", "triangle")), "left of", "black", "plain"),
    Scene((Thing("blue", "cross"), Thing("yellow", "square")), "right of", "gray", "checkered"),
)
STEPS, GUIDANCE, STRENGTH = 25, 3.0, 0.2  # the refiner owns the last fifth of the noise levels


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, default=Path("demo.png"), metavar="FILE.png", help="where the sheet goes")
    p.add_argument("--seed", type=seed, default=0)


def run(a: argparse.Namespace) -> None:
    writable(a.out)
    began = time.perf_counter()
    base = TextToImagePipeline.from_pretrained("pocket")
    refiner = ImageToImagePipeline.from_pretrained("pocket", vae=base.vae)
    pipe = EnsemblePipeline(base, refiner)
    print("The pocket pair: SDXL's architecture at tiny widths, trained by this package on drawn scenes of 128 pixels.")
    generators = [torch.Generator().manual_seed(a.seed + i) for i in range(len(SCENES))]
    prompts = [scene.caption for scene in SCENES]
    request = EnsembleRequest(prompt=prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    print(f"plan: {pipe.plan(request)}", flush=True)
    with torch.no_grad():
        for step in tqdm(pipe.steps(request), total=STEPS, unit="step", disable=None):
            latents = step.x
        painted = from_tensor(pipe.decode(latents))
    marks = [judge(as_array(picture), scene) for picture, scene in zip(painted, SCENES, strict=True)]
    captions = [f"{scene.caption}\n{told(mark)}" for scene, mark in zip(SCENES, marks, strict=True)]

    scene = SCENES[3]
    clean = draw(scene, np.random.default_rng(a.seed))
    original = from_tensor(torch.from_numpy(clean).permute(2, 0, 1)[None])[0]
    soft = original.filter(ImageFilter.GaussianBlur(2))
    generator = torch.Generator().manual_seed(a.seed)
    common: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": GUIDANCE, "generator": generator}
    refined = refiner(scene.caption, image=soft, strength=STRENGTH, **common).images[0]
    names = ("a scene as it was drawn", "blurred", f"refined at strength {STRENGTH}")
    pictures = (original, soft, refined)
    captions += [f"{name}\n{told(judge(as_array(p), scene))}" for name, p in zip(names, pictures, strict=True)]

    seconds = time.perf_counter() - began
    for caption in captions:
        print("  " + caption.replace("\n", ": "))
    sheet = contact_sheet([*painted, *pictures], captions, columns=3)
    settings = {"prompt": "; ".join(prompts), "seed": a.seed, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    settings |= {"versions": {"sdxl_ref": __version__, "torch": torch.__version__}, "seconds": round(seconds, 1)}
    save_png(sheet, a.out, settings)
    print(f"{sum(mark.all_right for mark in marks)} of {len(marks)} prompts painted all right, in {seconds:.0f} s")
    print(f"The pictures: {a.out.resolve()}")


def as_array(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def told(marks: Marks) -> str:
    """What the judge says of a picture."""
    wrong = [name for name, right in vars(marks).items() if not right]
    return "all right" if not wrong else "wrong: " + ", ".join(wrong)
