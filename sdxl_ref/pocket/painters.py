"""Three ways of painting with a base and a refiner, each with the same number of network evaluations."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.pipelines.ensemble import EnsemblePipeline
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.pocket.scenes import SIZE

BATCH = 32
STRENGTH = 0.3  # of the second stage
BASE_SHARE = 0.8  # of the evaluations that two stages would split as the ensemble does
WAYS = ("base alone", "ensemble", "two stages")


class Painters:
    """Base alone, ensemble and two stages, from the same noise. InputError where they cannot be compared."""

    def __init__(self, base: TextToImagePipeline, refiner: ImageToImagePipeline, steps: int, guidance: float) -> None:
        if not 3 <= steps <= 1000:
            raise InputError(f"expected 3 to 1000 steps, a fifth of which are a refiner's, found {steps}")
        if not math.isfinite(guidance):
            raise InputError(f"expected a finite number as guidance scale, found {guidance}")
        for pipe in (base, refiner):
            resolution = pipe.config.resolution
            if resolution != SIZE:
                raise InputError(
                    f"expected a {pipe.config.kind} that paints scenes of {SIZE} pixels, found {resolution}"
                )
        self.base = base
        self.refiner = refiner
        self.steps = steps
        self.common: dict[str, Any] = {"guidance_scale": guidance, "output_type": "pt"}
        self.refiner_steps = math.floor(STRENGTH * steps * BASE_SHARE + 0.5)
        self.second_stage_steps = math.ceil(self.refiner_steps / STRENGTH)  # of which STRENGTH are run

    def paint(self, way: str, captions: list[str]) -> Tensor:
        """Pictures (n,3,128,128) in [0,1] in one of WAYS; picture i starts from seed i."""
        methods = {"base alone": self.base_alone, "ensemble": self.ensemble, "two stages": self.two_stages}
        pictures = []
        for first in tqdm(range(0, len(captions), BATCH), desc=way, disable=None):
            batch = captions[first : first + BATCH]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
            pictures.append(methods[way](batch, generators))
        return torch.cat(pictures)

    def base_alone(self, captions: list[str], generators: list[torch.Generator]) -> Tensor:
        return self.base(captions, num_inference_steps=self.steps, generator=generators, **self.common).images

    def ensemble(self, captions: list[str], generators: list[torch.Generator]) -> Tensor:
        pipe = EnsemblePipeline(self.base, self.refiner)
        return pipe(captions, num_inference_steps=self.steps, generator=generators, **self.common).images

    def two_stages(self, captions: list[str], generators: list[torch.Generator]) -> Tensor:
        first = self.common | {"output_type": "latent", "num_inference_steps": self.steps - self.refiner_steps}
        latents = self.base(captions, generator=generators, **first).images  # (b,4,16,16)
        second = self.common | {"num_inference_steps": self.second_stage_steps, "strength": STRENGTH}
        return self.refiner(captions, image=latents, generator=generators, **second).images
