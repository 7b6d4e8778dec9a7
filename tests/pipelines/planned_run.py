"""A whole run of a pipeline in a process of its own: planned, done, and its peak. Prints both, as JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import peak_memory
import peers
import torch

from sdxl_ref import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import BASE_1_0, REFINER_1_0
from sdxl_ref.networks import tiled_vae
from sdxl_ref.pipelines.memory_plan import Run, plan
from sdxl_ref.weights.checkpoint import build_empty, prefixes

CONFIGS = {
    "small refiner": peers.SMALL_REFINER,
    "small base": peers.SMALL_BASE,
    "refiner": REFINER_1_0,
    "base": BASE_1_0,
}


def main(kind: str, dtype: str, size: str, tiled: str, packed: str) -> None:
    config = CONFIGS[kind]
    run = Run(
        config,
        int(size),
        int(size),
        dtype=getattr(torch, dtype),
        encodes=config.kind == "refiner",
        tiled=tiled == "tiled",
        packed=packed == "packed",
    )
    began = time.perf_counter()
    planned = plan(run)
    seconds = time.perf_counter() - began
    with peak_memory.Peak() as peak:
        work(kind, run)
    print(json.dumps([planned.peak, peak.bytes, seconds, planned.stages, sum(planned.weights.values())]))


def pipeline(kind: str, run: Run) -> Any:
    cls: Any = {"refiner": ImageToImagePipeline, "base": TextToImagePipeline}[run.config.kind]
    if kind in ("refiner", "base"):
        import full_file

        return cls.from_single_file(full_file.full_file(run.config), dtype=run.dtype, vae_dtype=run.vae_dtype)
    parts: dict[str, Any] = {}
    for part in prefixes(run.config):
        empty = build_empty(part, run.config).to(run.vae_dtype if part == "vae" else run.dtype)
        parts[part] = peers.randomise(empty.to_empty(device="cpu"), 0)
    return cls(run.config, **parts)


def work(kind: str, run: Run) -> None:
    pipe = pipeline(kind, run)
    if run.packed:
        pipe.pack()
    if run.tiled:  # as pipelines do it
        pipe.vae.decode = lambda z: untouched(pipe.vae, tiled_vae.decode, z)
        pipe.vae.encode = lambda images: untouched(pipe.vae, tiled_vae.encode, images)
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np"}
    if run.encodes:
        pixels = np.random.default_rng(0).random((1, run.height, run.width, 3), dtype=np.float32)
        pipe("a cup of coffee", image=pixels, strength=1.0, **call)
    else:
        pipe("a cup of coffee", height=run.height, width=run.width, **call)


def untouched(vae: Any, function: Any, x: torch.Tensor) -> Any:
    """A function of the network's own methods, which stand-ins cover."""
    stand_ins = {name: vars(vae).pop(name) for name in ("decode", "encode")}
    try:
        return function(vae, x)
    finally:
        vars(vae).update(stand_ins)


if __name__ == "__main__":
    main(*sys.argv[1:])
