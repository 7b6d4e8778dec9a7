"""What the pocket pair can do, on scenes that it was not trained on: the figures behind `sdxl-ref evaluate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.pocket.distance import patch_distances
from sdxl_ref.pocket.judge import Marks, judge
from sdxl_ref.pocket.scenes import SIZE, Scene, draw, random_scene
from sdxl_ref.training.diffusion import Batch, conditioning, epsilon_errors

SEED = 2  # not that of the training set
GROUPS = {
    "one thing": (1, False),
    "one thing, held out": (1, True),
    "two things": (2, False),
    "two things, held out": (2, True),
}
LEVELS = (0, 10, 25, 50, 75, 100, 125, 150, 175, 199, 250, 300, 400, 500, 600, 700, 800, 900, 999)  # training steps
UNDER_200 = tuple(range(5, 200, 10))  # the middles of twenty equal parts of 0..199
PARTS = 8  # of the pictures, from which the interval of a difference of patch distances comes
STUDENT = 2.365  # 97.5 % quantile of Student's t with PARTS - 1 degrees of freedom
BATCH = 32
ATTRIBUTES = [field.name for field in fields(Marks)]


@dataclass(frozen=True)
class Share:
    """So many right of so many, with Wilson's interval at 95 %."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        z, n = 1.96, self.of
        p = self.right / n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
        return min(low, p), max(high, p)  # which only rounding could leave outside

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
    if count < PARTS or count % 4:
        expected = f"the number of prompts must be a multiple of 4, a quarter for each group, at least {PARTS}"
        raise InputError(f"{expected}, found {count}")
    rng = np.random.default_rng(SEED)
    scenes = {
        group: [random_scene(rng, things, held_out) for _ in range(count // 4)]
        for group, (things, held_out) in GROUPS.items()
    }
    drawn = np.stack([draw(scene, rng) for group in scenes.values() for scene in group])
    return Prompts(scenes, torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous())


@torch.no_grad()
def vae_quality(vae: AutoencoderKL, drawn: Tensor) -> float:
    """Mean PSNR in dB of pictures (n,3,H,W) in [0,1] that went through the autoencoder."""
    found = []
    for each in drawn.split(BATCH):
        back = vae.decode(vae.encode(each * 2 - 1).mode()).clamp(-1, 1) * 0.5 + 0.5
        found.append(-10 * torch.log10(((back - each) ** 2).mean(dim=(1, 2, 3))))
    return float(torch.cat(found).mean())


class Painters:
    """Base alone, ensemble and two stages, each with the same number of network evaluations, from the same noise."""

    def __init__(self, base: TextToImagePipeline, refiner: ImageToImagePipeline, steps: int, guidance: float) -> None:
        if not 3 <= steps <= 1000:
            raise InputError(f"expected 3 to 1000 steps, a fifth of which are a refiner's, found {steps}")
        if not math.isfinite(guidance):
            raise InputError(f"expected a finite number as guidance scale, found {guidance}")
        for pipe in (base, refiner):
            if (found := pipe.config.resolution) != SIZE:
                raise InputError(f"expected a {pipe.config.kind} that paints scenes of {SIZE} pixels, found {found}")
        self.base, self.refiner, self.steps = base, refiner, steps
        self.common: dict[str, Any] = {"guidance_scale": guidance, "output_type": "pt"}
        self.second = math.floor(0.3 * steps * 0.8 + 0.5)  # the second stage runs these of `self.whole` steps
        self.whole = math.ceil(self.second / 0.3)

    def paint(self, how: str, captions: list[str]) -> Tensor:
        """Pictures (n,3,128,128) in [0,1]; picture i starts from seed i."""
        found = []
        for first in tqdm(range(0, len(captions), BATCH), desc=how, disable=None):
            batch = captions[first : first + BATCH]
            generator = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
            found.append(getattr(self, how.replace(" ", "_"))(batch, generator))
        return torch.cat(found)

    def base_alone(self, batch: list[str], generator: list[torch.Generator]) -> Tensor:
        return self.base(batch, num_inference_steps=self.steps, generator=generator, **self.common).images

    def ensemble(self, batch: list[str], generator: list[torch.Generator]) -> Tensor:
        both = EnsemblePipeline(self.base, self.refiner)
        return both(batch, num_inference_steps=self.steps, generator=generator, **self.common).images

    def two_stages(self, batch: list[str], generator: list[torch.Generator]) -> Tensor:
        first = self.common | {"output_type": "latent", "num_inference_steps": self.steps - self.second}
        latents = self.base(batch, generator=generator, **first).images
        rest = self.common | {"num_inference_steps": self.whole, "strength": 0.3}
        return self.refiner(batch, image=latents, generator=generator, **rest).images


HOW = ("base alone", "ensemble", "two stages")


def scores(painted: Tensor, chosen: Prompts) -> dict[str, dict[str, Share]]:
    """Group -> attribute (and "all right") -> share of pictures that show it."""
    pictures = iter(painted.permute(0, 2, 3, 1).numpy())
    found = {}
    for group, scenes in chosen.scenes.items():
        marks = [judge(next(pictures), scene) for scene in scenes]
        found[group] = {
            name: Share(sum(getattr(each, name) for each in marks), len(marks)) for name in (*ATTRIBUTES, "all_right")
        }
    return found


def nearer(first: Tensor, second: Tensor, chosen: Prompts) -> dict[int, tuple[float, float, float]]:
    """By how much less the patch distance of the second set is, by scale, with its 95 % interval (Student's t).

    Means over PARTS disjoint parts of the pictures, each against the drawn scenes of its own prompts.
    """
    found = []
    for i in range(PARTS):
        here = slice(i, None, PARTS)
        far, near = (patch_distances(each[here], chosen.drawn[here]) for each in (first, second))
        found.append([far[side] - near[side] for side in far])
    less = torch.tensor(found, dtype=torch.float64)
    mean, half = less.mean(dim=0), STUDENT * less.std(dim=0) / math.sqrt(len(less))
    return {side: (float(m), float(m - h), float(m + h)) for side, m, h in zip(far, mean, half, strict=True)}


@torch.no_grad()
def denoising_errors(
    pipe: TextToImagePipeline | ImageToImagePipeline, chosen: Prompts, levels: tuple[int, ...]
) -> Tensor:
    """Mean squared error of the predicted noise, (levels, pictures): all pictures at all levels, fixed noise."""
    kind = pipe.config.kind
    names = ("unet", "text_encoder", "text_encoder_2") if kind == "base" else ("unet", "text_encoder_2")
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in names})
    last = [float(SIZE)] * 2 if kind == "base" else [6.0]
    numbers = torch.tensor([[SIZE, SIZE, 0, 0, *last]])
    generator = torch.Generator().manual_seed(SEED)
    rows: list[list[Tensor]] = [[] for _ in levels]
    for images, scenes in batches(chosen):
        latents = pipe.vae.encode(images * 2 - 1).mode() * pipe.config.vae.scale_factor  # type: ignore[operator]
        batch = Batch(latents, [scene.caption for scene in scenes], numbers.expand(len(latents), -1))
        context, y = conditioning(parts, batch, torch.zeros(len(latents), dtype=torch.bool))
        noise = torch.randn(latents.shape, generator=generator)
        for row, level in zip(rows, levels, strict=True):
            t = torch.full((len(latents),), level)
            row.append(epsilon_errors(pipe.unet, latents, t, noise, context, y))
    return torch.stack([torch.cat(row) for row in rows])


def batches(chosen: Prompts) -> Iterator[tuple[Tensor, list[Scene]]]:
    scenes = chosen.all
    for first in range(0, len(scenes), BATCH):
        yield chosen.drawn[first : first + BATCH], scenes[first : first + BATCH]


def gain(base: Tensor, refiner: Tensor) -> tuple[float, float, float]:
    """How far a refiner's error lies under the base's, as a share, and its 95 % interval over pictures (bootstrap)."""
    base, refiner = base.mean(dim=0), refiner.mean(dim=0)  # (pictures,)
    index = torch.randint(len(base), (1000, len(base)), generator=torch.Generator().manual_seed(SEED))
    again = (1 - refiner[index].mean(dim=1) / base[index].mean(dim=1)).quantile(torch.tensor([0.025, 0.975]))
    return float(1 - refiner.mean() / base.mean()), float(again[0]), float(again[1])


def redrawn(chosen: Prompts) -> Tensor:
    """The same scenes drawn another time: as far from `chosen.drawn` as what looks right is."""
    rng = np.random.default_rng(SEED + 1)
    pictures = np.stack([draw(scene, rng) for scene in chosen.all])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
