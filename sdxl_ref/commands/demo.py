"""`sdxl-ref demo`: the pocket pair paints a few prompts and refines a degraded scene, on one contact sheet."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from sdxl_ref.commands.common import check_format, check_writable, save_picture, seed, versions
from sdxl_ref.pictures.images import from_tensor
from sdxl_ref.pictures.sheets import contact_sheet
from sdxl_ref.pipelines.ensemble import EnsemblePipeline, EnsembleRequest
from sdxl_ref.pocket.judge import Marks, judge
from sdxl_ref.pocket.scenes import Scene, Thing, draw

SCENES = (
    Scene((Thing("red", "circle"),), None, "white", "plain"),
    Scene((Thing("green", "triangle"),), None, "gray", "striped"),
    Scene((Thing("yellow", "cross"),), None, "black", "checkered"),
    Scene((Thing("red", "square"), Thing("blue", "circle")), "above", "white", "plain"),  # never trained on
    Scene((Thing("cyan", "circle"), Thing("pink", "triangle")), "left of", "black", "plain"),
    Scene((Thing("blue", "cross"), Thing("yellow", "square")), "right of", "gray", "checkered"),
)
REFINED = SCENES[3]
STEPS = 25
GUIDANCE = 3.0
STRENGTH = 0.2  # the refiner owns the last fifth of the noise levels


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, default=Path("demo.png"), metavar="FILE.png", help="where the sheet goes")
    p.add_argument("--seed", type=seed, default=0)


def run(a: argparse.Namespace) -> None:
    check_writable(a.out, read=["pocket"])
    check_format(a.out)
    began = time.perf_counter()
    pipe = EnsemblePipeline.from_pretrained("pocket", "pocket")
    print("The pocket pair: SDXL's architecture at tiny widths, trained by this package on drawn scenes of 128 pixels.")
    painted, marks = paint(pipe, a.seed)
    captions = [f"{scene.caption}\n{verdict(mark)}" for scene, mark in zip(SCENES, marks, strict=True)]
    refined = refine(pipe, a.seed)
    for name, picture in refined.items():
        captions.append(f"{name}\n{verdict(judge(as_array(picture), REFINED))}")

    seconds = time.perf_counter() - began
    for caption in captions:
        print("  " + caption.replace("\n", ": "))
    sheet = contact_sheet([*painted, *refined.values()], captions, columns=3)
    prompts = "; ".join(scene.caption for scene in SCENES)
    settings = {"prompt": prompts, "seed": a.seed, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    save_picture(sheet, a.out, settings | {"versions": versions(), "seconds": round(seconds, 1)})
    right = len([mark for mark in marks if mark.all_right])
    print(f"{right} of {len(marks)} prompts painted all right, in {seconds:.0f} s")
    print(f"The pictures: {a.out.resolve()}")


def paint(pipe: EnsemblePipeline, seed: int) -> tuple[list[Image.Image], list[Marks]]:
    """The scenes by the ensemble, and what the judge says of each."""
    generators = [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(len(SCENES))]
    prompts = [scene.caption for scene in SCENES]
    request = EnsembleRequest(prompt=prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    print(f"plan: {pipe.plan(request)}", flush=True)
    pictures = from_tensor(pipe.run(request))
    return pictures, [judge(as_array(picture), scene) for picture, scene in zip(pictures, SCENES, strict=True)]


def refine(pipe: EnsemblePipeline, seed: int) -> dict[str, Image.Image]:
    """A scene as it was drawn, blurred, and refined, with a caption each."""
    drawn = draw(REFINED, np.random.default_rng(seed % 2**64))
    original = from_tensor(torch.from_numpy(drawn).permute(2, 0, 1)[None])[0]
    soft = original.filter(ImageFilter.GaussianBlur(2))
    options: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": GUIDANCE}
    generator = torch.Generator().manual_seed(seed)
    refined = pipe.refiner(REFINED.caption, image=soft, strength=STRENGTH, generator=generator, **options).images[0]
    return {"a scene as it was drawn": original, "blurred": soft, f"refined at strength {STRENGTH}": refined}


def as_array(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def verdict(marks: Marks) -> str:
    """What the judge says of a picture."""
    wrong = [name for name, right in vars(marks).items() if not right]
    return "all right" if not wrong else "wrong: " + ", ".join(wrong)
