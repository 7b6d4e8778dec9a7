"""What `sdxl-ref refine` does, done by diffusers: a file in the official layout and a picture in, a PNG out.

Run as a program, in a process of its own, by the tests at full size and by the benchmark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SCHEDULER = {  # as it ships with SDXL
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": [None, None],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_folder(folder: Path) -> Path:
    """The configuration of diffusers' refiner pipeline without weights, as the hub has it; returns the folder."""
    import peers
    from diffusers import UNet2DConditionModel

    from sdxl_ref.config import REFINER_1_0

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    peers.unet2d(REFINER_1_0.unet, UNet2DConditionModel).save_config(folder / "unet")
    peers.vae2d(REFINER_1_0.vae).save_config(folder / "vae")
    text = peers.clip_text_config(REFINER_1_0.text_encoders[0])
    text.architectures = ["CLIPTextModelWithProjection"]
    text.save_pretrained(folder / "text_encoder_2")
    peers.clip_tokenizer(folder / "tokenizer_2", "!").save_pretrained(folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))  # last: its presence means the rest is there
    return folder


def open_pipeline(file: Path, folder: Path, dtype: str) -> Any:
    """diffusers' own reading of the file, with no look at the network."""
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline.from_single_file(
        str(file), config=str(folder), torch_dtype=getattr(torch, dtype), local_files_only=True, add_watermarker=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="made by write_folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--strength", type=float, default=0.3)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()

    import torch
    from PIL import Image

    pipe = open_pipeline(a.checkpoint, a.folder, a.dtype)
    [picture] = pipe(
        a.prompt,
        image=Image.open(a.image).convert("RGB"),
        strength=a.strength,
        num_inference_steps=a.steps,
        guidance_scale=a.guidance_scale,
        generator=torch.Generator().manual_seed(a.seed),
    ).images
    picture.save(a.out)


if __name__ == "__main__":
    main()
