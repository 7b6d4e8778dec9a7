"""Open every part of a file as a pipeline, ours or diffusers', and refine with it; prints one line of JSON.

A child of bench.py. Importing the pipeline comes before, and is not counted: bench.py times it by itself.

    whole.py SIDE FILE FOLDER DTYPE [RUN …]

A RUN is STEPSxPIXELS: so many steps of a refinement in float32, or all in bfloat16, the VAE too.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

PHOTO = Path(__file__).resolve().parent.parent / "sdxl_ref" / "data" / "photo.jpg"


def main(side: str, file: str, folder: str, dtype: str, *runs: str) -> None:
    import torch
    from PIL import Image

    if side == "diffusers":
        from diffusers import StableDiffusionXLImg2ImgPipeline  # noqa: F401  what open_pipeline imports
        from diffusers_refine import open_pipeline

        began = time.perf_counter()
        pipe: Any = open_pipeline(Path(file), Path(folder), dtype)
    else:
        from sdxl_ref import ImageToImagePipeline

        began = time.perf_counter()
        kind = getattr(torch, dtype)
        pipe = ImageToImagePipeline.from_single_file(file, dtype=kind, vae_dtype=kind if runs else None)
        if side == "ours, packed":
            pipe.pack()
    opened = time.perf_counter() - began
    pipe.set_progress_bar_config(disable=True) if side == "diffusers" else None
    seconds = []
    for run in runs:
        steps, pixels = map(int, run.split("x"))
        image = Image.open(PHOTO).convert("RGB").resize((pixels, pixels))
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        pipe("a cup", image=image, strength=0.5, num_inference_steps=2 * steps, generator=generator)
        seconds.append(time.perf_counter() - began)
    print(
        json.dumps({"opened": opened, "seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
