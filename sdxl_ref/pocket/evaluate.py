"""What the pocket pair can do, on scenes that it was not trained on: the figures behind `sdxl-ref evaluate`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.denoiser import Prediction
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.pipelines.pipeline import Pipeline
from sdxl_ref.pocket.distance import patch_distances
from sdxl_ref.pocket.examples import SCORE, Label
from sdxl_ref.pocket.judge import Marks, judge
from sdxl_ref.pocket.scenes import SIZE, Scene, draw, random_scene
from sdxl_ref.training.diffusion import Batch, encode_conditioning, epsilon_errors

SEED = 2  # not that of the training set
GROUPS = {  # how many things, and whether the combination is held out of training
    "one thing": (1, False),
    "one thing, held out": (1, True),
    "two things": (2, False),
    "two things, held out": (2, True),
}
LEVELS = (0, 10, 25, 50, 75, 100, 125, 150, 175, 199, 250, 300, 400, 500, 600, 700, 800, 900, 999)  # training steps
UNDER_200 = tuple(range(5, 200, 10))  # the middles of twenty equal parts of 0..199
MOST = 10_000  # prompts
PARTS = 8  # of the pictures, from which the interval of a difference of patch distances comes
STUDENT = 2.365  # 97.5 % quantile of Student's t with PARTS - 1 degrees of freedom
NORMAL = 1.96  # 97.5 % quantile of the normal distribution
RESAMPLES = 1000  # of the bootstrap
BATCH = 32
ATTRIBUTES = [field.name for field in fields(Marks)]


class Interval(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Share:
    """So many right of so many, with Wilson's interval at 95 %."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        n = self.of
        share = self.right / n
        spread = NORMAL * NORMAL / n
        middle = share + spread / 2
        half = NORMAL * math.sqrt(share * (1 - share) / n + NORMAL * NORMAL / (4 * n * n))
        low = (middle - half) / (1 + spread)
        high = (middle + half) / (1 + spread)
        return min(low, share), max(high, share)  # only rounding could leave the share outside

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / self.of:.1%} ({self.right}/{self.of}; {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class Prompts:
    """Scenes by group, and a picture of each as it was drawn, (n,3,128,128) in [0,1]."""

    scenes: dict[str, list[Scene]]
    drawn: Tensor

    @property
    def all(self) -> list[Scene]:
        return [scene for scenes in self.scenes.values() for scene in scenes]


def prompts(count: int) -> Prompts:
    """`count` scenes in four equal groups. InputError unless it is a multiple of 4, at least PARTS."""
    if not PARTS <= count <= MOST or count % len(GROUPS):
        expected = f"the number of prompts must be a multiple of 4, a quarter for each group, from {PARTS} to {MOST}"
        raise InputError(f"{expected}, found {count}")
    rng = np.random.default_rng(SEED)
    scenes = {}
    for group, (things, held_out) in GROUPS.items():
        scenes[group] = [random_scene(rng, things, held_out) for _ in range(count // len(GROUPS))]
    return Prompts(scenes, draw_all([scene for group in scenes.values() for scene in group], rng))


def redrawn(chosen: Prompts) -> Tensor:
    """The same scenes drawn another time: as far from `chosen.drawn` as what looks right is."""
    return draw_all(chosen.all, np.random.default_rng(SEED + 1))


def draw_all(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Pictures of scenes, (n,3,128,128) in [0,1]."""
    pictures = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()  # (n,128,128,3) -> (n,3,128,128)


@torch.no_grad()
def vae_quality(vae: AutoencoderKL, drawn: Tensor) -> float:
    """Mean PSNR in dB of pictures (n,3,H,W) in [0,1] that went through the autoencoder."""
    qualities = []
    for images in drawn.split(BATCH):
        decoded = vae.decode(vae.encode(images * 2 - 1).mode()).clamp(-1, 1) * 0.5 + 0.5
        errors = ((decoded - images) ** 2).mean(dim=(1, 2, 3))  # (b,3,H,W) -> (b,)
        qualities.append(-10 * torch.log10(errors))
    return float(torch.cat(qualities).mean())


def scores(painted: Tensor, chosen: Prompts) -> dict[str, dict[str, Share]]:
    """Group -> attribute (and "all right") -> share of pictures (n,3,128,128) in [0,1] that show it."""
    pictures = iter(painted.permute(0, 2, 3, 1).numpy())  # (n,3,128,128) -> (n,128,128,3)
    shares: dict[str, dict[str, Share]] = {}
    for group, scenes in chosen.scenes.items():
        marks = [judge(next(pictures), scene) for scene in scenes]
        shares[group] = {}
        for attribute in (*ATTRIBUTES, "all_right"):
            right = [getattr(mark, attribute) for mark in marks].count(True)
            shares[group][attribute] = Share(right, len(marks))
    return shares


def nearer(first: Tensor, second: Tensor, chosen: Prompts) -> dict[int, Interval]:
    """By how much less the patch distance of the second set of pictures is, by scale (Student's t).

    Means over PARTS disjoint parts of the pictures, each against the drawn scenes of its own prompts.
    """
    rows = []
    for i in range(PARTS):
        part = slice(i, None, PARTS)
        first_distances = patch_distances(first[part], chosen.drawn[part])
        second_distances = patch_distances(second[part], chosen.drawn[part])
        rows.append([first_distances[side] - second_distances[side] for side in first_distances])
    less = torch.tensor(rows, dtype=torch.float64)  # (PARTS,scales)
    means = less.mean(dim=0)  # (scales,)
    halves = STUDENT * less.std(dim=0) / math.sqrt(PARTS)
    intervals = {}
    for side, mean, half in zip(first_distances, means, halves, strict=True):
        intervals[side] = Interval(float(mean), float(mean - half), float(mean + half))
    return intervals


@torch.no_grad()
def denoising_errors(pipe: Pipeline, chosen: Prompts, levels: tuple[int, ...]) -> Tensor:
    """Mean squared error of the predicted noise, (levels,pictures): all pictures at all levels, fixed noise."""
    kind = pipe.config.kind
    prediction = Prediction(pipe.config.prediction)
    names = ("unet", "text_encoder", "text_encoder_2") if kind == "base" else ("unet", "text_encoder_2")
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in names})
    generator = torch.Generator().manual_seed(SEED)
    rows: list[list[Tensor]] = [[] for _ in levels]
    for images, captions in batches(chosen):
        latents = pipe.vae.encode(images * 2 - 1).mode() * pipe.config.vae.scale_factor  # type: ignore[operator]
        numbers = torch.stack([Label(caption, SIZE, SCORE).numbers(kind) for caption in captions])  # (b,k)
        kept_captions = torch.zeros(len(latents), dtype=torch.bool)
        conditioning = encode_conditioning(parts, Batch(latents, captions, numbers), kept_captions)
        noise = torch.randn(latents.shape, generator=generator)
        for row, level in zip(rows, levels, strict=True):
            timesteps = torch.full((len(latents),), level)
            errors = epsilon_errors(
                pipe.unet, latents, timesteps, noise, conditioning.context, conditioning.y, prediction
            )
            row.append(errors)
    return torch.stack([torch.cat(row) for row in rows])  # (b,) of each batch -> (levels,pictures)


def batches(chosen: Prompts) -> Iterator[tuple[Tensor, list[str]]]:
    """Drawn pictures (b,3,128,128) in [0,1], and their captions."""
    captions = [scene.caption for scene in chosen.all]
    for first in range(0, len(captions), BATCH):
        yield chosen.drawn[first : first + BATCH], captions[first : first + BATCH]


def gain(base: Tensor, refiner: Tensor) -> Interval:
    """The share by which a refiner's errors (levels,pictures) are lower than a base's (bootstrap over pictures)."""
    base = base.mean(dim=0)  # (levels,pictures) -> (pictures,)
    refiner = refiner.mean(dim=0)
    index = torch.randint(len(base), (RESAMPLES, len(base)), generator=torch.Generator().manual_seed(SEED))
    shares = 1 - refiner[index].mean(dim=1) / base[index].mean(dim=1)  # (RESAMPLES,pictures) -> (RESAMPLES,)
    low, high = shares.quantile(torch.tensor([0.025, 0.975]))
    return Interval(float(1 - refiner.mean() / base.mean()), float(low), float(high))
