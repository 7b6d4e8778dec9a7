"""Open every part of a file as a pipeline, ours or diffusers'; prints the seconds. A child of bench.py.

Importing the pipeline comes before, and is not counted: bench.py times it by itself.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main(side: str, file: str, folder: str, dtype: str) -> None:
    import torch

    if side == "ours":
        from sdxl_ref import ImageToImagePipeline

        began = time.perf_counter()
        pipe = ImageToImagePipeline.from_single_file(file, dtype=getattr(torch, dtype))
    else:
        from diffusers import StableDiffusionXLImg2ImgPipeline  # noqa: F401  what open_pipeline imports
        from diffusers_refine import open_pipeline

        began = time.perf_counter()
        pipe = open_pipeline(Path(file), Path(folder), dtype)
    seconds = time.perf_counter() - began
    assert next(pipe.unet.parameters()).dtype == getattr(torch, dtype)
    print(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
