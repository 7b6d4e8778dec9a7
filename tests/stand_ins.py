"""Small models of seeded weights under the official files' names, for README's commands."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import peers
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.weights.checkpoint_saving import save_checkpoint

SIDE = 128  # pixels of the pictures that they paint and learn from; else minutes
LINE = {"file_name": "cup.png", "text": "a cup of coffee in the style of sks", "aesthetic_score": 6.5}


def write(folder: Path) -> None:
    """Both checkpoints, a folder of training pictures, and a trace of another implementation: its schedule alone."""
    sigmas = NoiseSchedule().discretize(10)[-6:].contiguous()  # of a kit's run, which is half of ten steps
    save_file({"schedule/sigmas": sigmas}, folder / "theirs.safetensors")
    refiner = {"unet": peers.small_unet(), "vae": peers.small_vae(), "text_encoder_2": peers.small_openclip()}
    base = refiner | {"unet": peers.small_unet(peers.SMALL_BASE.unet), "text_encoder": peers.small_clip()}
    for kind, config, networks in (("refiner", peers.SMALL_REFINER, refiner), ("base", peers.SMALL_BASE, base)):
        small = replace(config, resolution=SIDE)
        save_checkpoint(folder / f"sd_xl_{kind}_1.0.safetensors", small, networks, torch.float16)
    (folder / "pictures").mkdir(exist_ok=True)
    with Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")) as photo:
        photo.resize((72, 64)).save(folder / "pictures" / "cup.png")
    (folder / "pictures" / "metadata.jsonl").write_text(json.dumps(LINE))
