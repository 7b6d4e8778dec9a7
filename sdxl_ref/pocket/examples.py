"""What the pocket pair learns from: drawn pictures, each with its caption, its original size and its score."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.pocket.scenes import SIZE, USUAL, Array, Look, Scene, draw, random_scene
from sdxl_ref.text.conditioning import Numbers
from sdxl_ref.weights.file_saving import write_text
from sdxl_ref.weights.saving import replacing

Pixels = NDArray[np.uint8]
SEED = 1
SOFT_SHARE = 0.1  # of pictures of half the resolution, which their numbers say
SCORE = 6.0
SOFT_SCORE = 2.5


class Label(NamedTuple):
    """What the networks learn of a picture besides its pixels."""

    caption: str
    original_side: int  # before it was enlarged
    score: float

    def numbers(self, kind: str) -> Tensor:
        """The sizes and the score as a "base" (6,) or a "refiner" (5,) reads them."""
        original_size = (self.original_side, self.original_side)
        return Numbers(original_size, (0, 0), (SIZE, SIZE), self.score).tensor(kind)


def training_scene(rng: np.random.Generator) -> Scene:
    """Two in three have two things."""
    things = 2 if rng.random() < 2 / 3 else 1
    return random_scene(rng, things)


def example(i: int, seed: int = SEED, look: Look = USUAL) -> tuple[Pixels, Label]:
    """Picture i of the training set (128,128,3), and its label.

    Some pictures are soft: enlarged from half the size, with a lower score.
    """
    rng = np.random.default_rng([seed, i])
    scene = training_scene(rng)
    picture = draw(scene, rng, look)
    is_soft = rng.random() < SOFT_SHARE
    if is_soft:
        picture = soften(picture)
    pixels = (picture * 255).round().astype(np.uint8)
    label = Label(scene.caption, SIZE // 2, SOFT_SCORE) if is_soft else Label(scene.caption, SIZE, SCORE)
    return pixels, label


def soften(picture: Array) -> Array:
    """A picture (128,128,3) at half the size, enlarged again."""
    half = picture.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))  # (128,128,3) -> (64,64,3)
    small = torch.from_numpy(half).permute(2, 0, 1)[None]  # (64,64,3) -> (1,3,64,64)
    large = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)  # (1,3,128,128)
    return large[0].permute(1, 2, 0).numpy()  # (1,3,128,128) -> (128,128,3)


def training_set(folder: Path, count: int) -> tuple[Pixels, list[Label]]:
    """The first pictures of the training set (n,128,128,3), mapped, and their labels; drawn once, into a folder.

    InputError where the files are damaged or of another number of pictures, and where the disk has no room.
    """
    pixels_path = folder / "pixels.npy"
    labels_path = folder / "told.json"
    if not (pixels_path.exists() and labels_path.exists()):
        draw_training_set(pixels_path, labels_path, count)
    try:
        pixels = np.load(pixels_path, mmap_mode="r")
        labels = [Label(*row) for row in json.loads(labels_path.read_text())]
        if not len(pixels) == len(labels) == count:
            raise ValueError(f"expected {count} pictures, found {len(pixels)} and {len(labels)} labels")
    except (OSError, ValueError, TypeError) as error:
        remedy = "delete them, to have them drawn again"
        raise InputError(f"could not read {pixels_path} and {labels_path} ({error}): {remedy}") from error
    return pixels, labels


def draw_training_set(pixels_path: Path, labels_path: Path, count: int) -> None:
    """Draw pictures into a file, and write their labels into another. InputError where there is no room for them."""
    folder = pixels_path.parent
    needed = count * SIZE * SIZE * 3
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{count} pictures need {needed / 1e9:.1f} GB in {folder}, found {free / 1e9:.1f} GB free")
    with replacing(pixels_path) as temporary:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, SIZE, SIZE, 3))
        labels = []
        for i in tqdm(range(count), desc="scenes", disable=None):
            pixels[i], label = example(i)
            labels.append(label)
        pixels.flush()
        write_text(labels_path, json.dumps(labels))


def to_images(pixels: Pixels, device: torch.device) -> Tensor:
    """(b,H,W,3) uint8 -> (b,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
