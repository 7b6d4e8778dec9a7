"""`make demo`: the refiner's whole path, on a small checkpoint of seeded random weights."""

from importlib.resources import files
from pathlib import Path

import torch

from sdxl_ref.checkpoint import build, prefixes
from sdxl_ref.cli import main
from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.saving import save_checkpoint

SMALL = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2),
        num_head_channels=32,
        transformer_depth=2,
        context_dim=64,
        adm_in_channels=64 + 5 * 256,
    ),
    text_encoders=(TextEncoderConfig(width=64, heads=2, layers=3, embed_dim=64),),
    vae=VAEConfig(ch=32),
)


def run(folder: Path = Path("demo")) -> int:
    """Write the checkpoint and refine the photo that ships; returns the command's exit status."""
    folder.mkdir(exist_ok=True)
    checkpoint, picture = folder / "random_refiner.safetensors", folder / "refined.png"
    torch.manual_seed(0)
    save_checkpoint(checkpoint, SMALL, {part: build(part, SMALL) for part in prefixes(SMALL)}, torch.float16)
    print(f"{checkpoint}: the refiner's architecture at small width. Its weights are RANDOM: they show that")
    print("everything runs, from a photo to a PNG, not what SDXL can do. Expect noise.")
    photo = str(files("sdxl_ref") / "data" / "photo.jpg")
    command = ["refine", photo, "--prompt", "a cup of coffee on a wooden table", "--checkpoint", str(checkpoint)]
    print("$ sdxl-ref " + " ".join(f"'{word}'" if " " in word else word for word in [*command, "--out", str(picture)]))
    status = main([*command, "--out", str(picture)])
    if status == 0:
        print(f"The picture: {picture.resolve()}")
    return status


if __name__ == "__main__":
    raise SystemExit(run())
