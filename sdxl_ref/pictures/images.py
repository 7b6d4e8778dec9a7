"""Pictures in and out: PIL <-> tensor, one rule for sizes, and the settings that a PNG carries."""

import json
import math
import os
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from sdxl_ref.config import InputError

MULTIPLE = 8  # the VAE's downsampling: sides of a picture are multiples of it
LABELS = {  # of settings, as the AUTOMATIC1111 web UI writes them
    "num_inference_steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "strength": "Denoising strength",
}


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Open a path, an http(s) address or a PIL picture as RGB, upright (EXIF orientation applied).

    InputError where there is no such file or it is no picture.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    name = os.fspath(source)
    try:
        remote = name.startswith(("http://", "https://"))
        with Image.open(urllib.request.urlopen(name, timeout=60) if remote else name) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"no such picture: {name}") from error
    except Exception as error:  # Pillow's decoders and urllib raise of many kinds on damaged data
        reason = str(error).replace("\n", " ")
        raise InputError(f"expected a picture (PNG, JPEG, WebP, …), could not read {name}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> upright 8-bit RGB: transparency goes over white, 16 bits are divided by 257, grey is repeated."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError("expected a picture of 8 or 16 bits, found floating point, whose range is not known")
    if image.mode.startswith("I"):  # 16-bit grey
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Image.fromarray(np.array(image.convert("RGB")))  # leaves behind an EXIF that may be damaged


def fit(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The size rule: shrink (Lanczos) to at most `max_pixels`, then crop the centre to sides that are multiples of 8.

    Never enlarges. InputError where a side is left with fewer than 8 pixels.
    """
    original = f"{image.width}x{image.height}"
    if max_pixels is not None and image.width * image.height > max_pixels:
        width = max(1, math.isqrt(max_pixels * image.width // image.height))
        height = max(1, math.isqrt(max_pixels * image.height // image.width))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if min(image.size) < MULTIPLE:
        raise InputError(f"expected a picture of at least {MULTIPLE}x{MULTIPLE} pixels, found {original}")
    width = image.width - image.width % MULTIPLE
    height = image.height - image.height % MULTIPLE
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (1,3,H,W) float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]  # (h,w,3) -> (1,3,h,w)
    return 2.0 * (values.float() / 255.0) - 1.0


def from_tensor(images: Tensor) -> list[Image.Image]:
    """(b,3,H,W) in [0, 1] -> RGB pictures, rounded to the nearest of 256 levels."""
    values = (images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).numpy()]  # (b,3,h,w) -> (b,h,w,3)


def png_chunks(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """The text chunks of a PNG that carries its settings.

    `parameters` is the form that common viewers read, `sdxl_ref` is `settings` as JSON.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", parameters(settings).encode(errors="replace").decode())  # a prompt of broken bytes
    chunks.add_itxt("sdxl_ref", json.dumps(settings))
    return chunks


def parameters(settings: Mapping[str, Any]) -> str:
    """Settings in the form of the AUTOMATIC1111 web UI: prompt, negative prompt, then one line of `Key: value`."""
    fields = [f"{label}: {settings[key]}" for key, label in LABELS.items() if settings.get(key) is not None]
    digest = settings.get("checkpoint", {}).get("sha256")
    if digest:
        fields.append(f"Model hash: {digest[:10]}")
    fields.append(f"Version: sdxl-ref {settings['versions']['sdxl_ref']}")
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(fields)])
