"""For the tests of training: tiny models, folders of pictures, and data sets that count what is encoded."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
from PIL import Image
from torch import nn

from sdxl_ref.config import ModelConfig, TextEncoderConfig, VAEConfig
from sdxl_ref.training.cache import fingerprint
from sdxl_ref.training.data import Dataset
from sdxl_ref.training.image_folder import METADATA, read_folder

OPENCLIP = TextEncoderConfig(width=32, heads=2, layers=2, embed_dim=48)
CLIP = TextEncoderConfig(width=32, heads=2, layers=2, embed_dim=32, activation="quick_gelu")
REFINER = ModelConfig(
    unet=replace(
        peers.SMALL_REFINER.unet,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(2,),
        transformer_depth=1,
        context_dim=OPENCLIP.width,
        adm_in_channels=OPENCLIP.embed_dim + 5 * 256,
    ),
    text_encoders=(OPENCLIP,),
    vae=VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
    resolution=128,
)
BASE = replace(
    REFINER,
    unet=replace(REFINER.unet, context_dim=CLIP.width + OPENCLIP.width, adm_in_channels=OPENCLIP.embed_dim + 6 * 256),
    text_encoders=(CLIP, OPENCLIP),
)
CONFIGS = {"base": BASE, "refiner": REFINER}
TOWERS = {"base": ("text_encoder", "text_encoder_2"), "refiner": ("text_encoder_2",)}
LINES: list[dict[str, Any]] = [
    {"file_name": "square.png", "text": "a cup", "aesthetic_score": 7},
    {"file_name": "wide.png", "text": "two cups"},
    {"file_name": "more/other.png", "text": "a cup"},
    {"file_name": "square.png", "text": "the same cup", "aesthetic_score": 5.5},
]


def gradient(height: int, width: int) -> Image.Image:
    """Each pixel says where it is: red from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def speckled(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_folder(folder: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    """A folder with these lines and three small pictures, of two buckets."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for i, (name, height, width) in enumerate([("square", 100, 102), ("wide", 30, 120), ("more/other", 128, 128)]):
        speckled(i, height, width).save(folder / f"{name}.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")
    return folder


@dataclass
class Networks:
    """The networks of one kind, and how often each was called."""

    config: ModelConfig
    parts: dict[str, nn.Module]
    calls: Counter[str]

    def dataset(self, folder: Path, cache: Path, **options: Any) -> Dataset:
        self.calls.clear()
        fingerprints = {name: fingerprint(part) for name, part in self.parts.items()}
        return Dataset(read_folder(folder).examples, cache, self.config, self.parts, fingerprints, **options)


def networks(kind: str) -> Networks:
    config = CONFIGS[kind]
    calls = Counter[str]()
    parts = {name: peers.network(name, config, seed=1) for name in ("vae", *TOWERS[kind])}

    def count(name: str) -> Any:
        return lambda *_: calls.update([name])

    for name, part in parts.items():
        encoder: Any = part.encoder if name == "vae" else part
        encoder.register_forward_hook(count(name))
    return Networks(config, parts, calls)


def bytes_of(cache: Path, kind: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob(f"{kind}*")}


def rows_of(dataset: Dataset) -> list[Any]:
    """All that each example gives, to be compared."""
    batches = [dataset.batch([i]) for i in range(len(dataset))]
    return [(each.mean.tolist(), each.std.tolist(), each.captions, each.numbers.tolist()) for each in batches]
