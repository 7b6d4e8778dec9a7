"""What the pocket pair learns from: pictures, what the UNets are told of them, and what the towers learn to tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.conditioning import Numbers
from sdxl_ref.config import InputError
from sdxl_ref.pocket.scenes import COLOURS, GROUNDS, SHAPES, SIZE, TEXTURES, USUAL, Look, Scene, draw, random_scene
from sdxl_ref.saving import replacing

Pixels = NDArray[np.uint8]
SEED = 1
SOFT = 0.1  # share of pictures of half the resolution, which the numbers tell of


class Told(NamedTuple):
    """What the networks are told of a picture."""

    caption: str
    original: int  # its side before it was enlarged
    score: float

    def numbers(self, kind: str) -> Tensor:
        sizes = Numbers((self.original, self.original), (0, 0), (SIZE, SIZE), self.score)
        return sizes.tensor(kind)


def example(i: int, seed: int = SEED, look: Look = USUAL) -> tuple[Pixels, str, int, float]:
    """Picture i of the training set (128,128,3), and what is told of it.

    Two scenes in three have two things; some pictures are soft: enlarged from half the size, at a lower score.
    """
    rng = np.random.default_rng([seed, i])
    scene = random_scene(rng, 1 + int(rng.random() < 2 / 3))
    picture = draw(scene, rng, look)
    soft = rng.random() < SOFT
    if soft:
        picture = picture.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
        small = torch.from_numpy(picture).permute(2, 0, 1)[None]
        large = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        picture = large[0].permute(1, 2, 0).numpy()
    pixels = (picture * 255).round().astype(np.uint8)
    return pixels, scene.caption, SIZE // 2 if soft else SIZE, 2.5 if soft else 6.0


def kept(folder: Path, count: int) -> tuple[Pixels, list[Told]]:
    """The first pictures of the training set (n,128,128,3), mapped, and what is told of them: drawn once, then kept.

    InputError where they are damaged or of another number, and where the disk has no room.
    """
    path, words = folder / "pixels.npy", folder / "told.json"
    if not (path.exists() and words.exists()):
        if (free := shutil.disk_usage(folder).free) < (room := count * SIZE * SIZE * 3):
            raise InputError(f"{count} pictures need {room / 1e9:.1f} GB in {folder}, found {free / 1e9:.1f} GB free")
        beside = path.with_name("pixels.part.npy")
        pixels = np.lib.format.open_memmap(beside, "w+", np.uint8, (count, SIZE, SIZE, 3))
        told = []
        for i in tqdm(range(count), desc="scenes", disable=None):
            pixels[i], caption, original, score = example(i)
            told.append(Told(caption, original, score))
        pixels.flush()
        with replacing(words) as file:
            file.write_text(json.dumps(told))
        beside.replace(path)
    try:
        mapped, told = np.load(path, mmap_mode="r"), [Told(*row) for row in json.loads(words.read_text())]
        if not len(mapped) == len(told) == count:
            raise ValueError(f"expected {count} pictures, found {len(mapped)} and what is told of {len(told)}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"could not read {path} and {words} ({error}): delete them, to have them drawn again"
        ) from error
    return mapped, told


def to_images(pixels: Pixels, device: torch.device) -> Tensor:
    """(b,H,W,3) uint8 -> (b,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


FACTS = {  # what a caption tells of a picture: how many answers each
    "arrangement": 3,
    **{f"{place} {what}": n + 1 for place in ("first", "last") for what, n in (("colour", 6), ("shape", 4))},
    "ground": 3,
    "texture": 3,
}


class Reader(nn.Module):
    """Reads off a tower's outputs what a picture shows; only there to train the towers by, like CLIP's image tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), nn.Linear(width, sum(FACTS.values()))

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        """(b,width) -> the logits of each fact, (b,answers)."""
        return self.heads(self.norm(state)).split(list(FACTS.values()), dim=1)

    @staticmethod
    def facts(scene: Scene) -> list[int]:
        """The right answers. A single thing is the first and leaves the last answer ("none") for the other."""
        colours, things = tuple(COLOURS), scene.by_place
        arrangement = 0 if len(things) == 1 else 1 + (scene.relation in ("above", "below"))
        found = [(colours.index(thing.colour), SHAPES.index(thing.shape)) for thing in things]
        found += [(len(colours), len(SHAPES))] * (2 - len(things))
        return [arrangement, *found[0], *found[1], tuple(GROUNDS).index(scene.ground), TEXTURES.index(scene.texture)]
