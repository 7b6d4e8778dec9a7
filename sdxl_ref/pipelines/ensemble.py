"""The ensemble of experts: the base denoises down to a level, the refiner from there, inside one run of the solver
(Balaji et al. 2022, arXiv:2211.01324; Podell et al. 2023, arXiv:2307.01952, section 2.5).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.denoiser import Denoiser
from sdxl_ref.diffusion.samplers import SAMPLERS, Step
from sdxl_ref.diffusion.schedule import Grid, NoiseSchedule
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.pipeline import run
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline, TextToImageRequest


@dataclass(frozen=True, kw_only=True)
class EnsembleRequest(TextToImageRequest):
    """Where the refiner takes over, in one of three units."""

    switch: float | None = None  # share of the training steps, in (0, 1]; 0.8 where nothing is given
    switch_sigma: float | None = None  # the lowest level that is the base's
    switch_step: int | None = None  # number of steps that start in the base


class EnsemblePlan(NamedTuple):
    """The levels, the level from which upwards the base evaluates, and how often each network will."""

    grid: Grid
    switch: float
    evaluations: tuple[int, int]  # base, refiner; the second halves of second-order steps included

    def __str__(self) -> str:
        steps = self.grid.steps_above(self.switch)
        levels = [float(self.grid.sigmas[i]) for i in (0, steps, -1)]
        base = f"base {self.evaluations[0]} evaluations, sigma {levels[0]:.4g} → {levels[1]:.4g}"
        return f"{base}; refiner {self.evaluations[1]}, {levels[1]:.4g} → {levels[2]:.4g}"


@dataclass(frozen=True)
class Experts:
    """An ensemble of experts as one denoiser: `base` owns every sigma from `switch` upwards, `refiner` those below.

    The sampler does not know: its history and its half steps go through the hand-off undisturbed.
    """

    base: Denoiser
    refiner: Denoiser
    switch: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (self.base if float(sigma) >= self.switch else self.refiner)(x, sigma)


def _of_base(name: str) -> Any:
    """An attribute that is read from, and written to, the base."""
    return property(lambda self: getattr(self.base, name), lambda self, part: setattr(self.base, name, part))


class EnsemblePipeline:
    """A base and a refiner as one. Parts that pipelines have (`unet`, `vae`, …) are the base's."""

    request_type = EnsembleRequest

    def __init__(self, base: TextToImagePipeline, refiner: ImageToImagePipeline) -> None:
        TextToImagePipeline.check(base.config)
        ImageToImagePipeline.check(refiner.config)
        self.base, self.refiner = base, refiner

    @classmethod
    def from_single_file(
        cls, base: str | Path, refiner: str | Path, *, low_memory: bool = False, **options: Any
    ) -> "EnsemblePipeline":
        """Open two files; `options` as in `Pipeline.from_single_file`. The refiner uses the base's VAE.

        low_memory: one set of weights in memory at a time, each read when it works and dropped for the next.
        """
        if low_memory:
            from sdxl_ref.on_demand import Slot

            options["slot"] = Slot()
        opened = TextToImagePipeline.from_single_file(base, **options)
        return cls(opened, ImageToImagePipeline.from_single_file(refiner, **options, vae=opened.vae))

    def to(self, *args: Any, **kwargs: Any) -> "EnsemblePipeline":
        self.base.to(*args, **kwargs)
        self.refiner.to(*args, **kwargs)
        return self

    unet, vae = _of_base("unet"), _of_base("vae")
    text_encoder, text_encoder_2 = _of_base("text_encoder"), _of_base("text_encoder_2")

    @staticmethod
    def plan(request: EnsembleRequest) -> EnsemblePlan:
        """Who evaluates where, by running the solver on nothing. InputError where one expert would run 0 steps."""
        grid, _ = TextToImagePipeline.plan(request)
        switch = _switch(request, grid)
        seen: list[float] = []

        def record(x: Tensor, sigma: Tensor) -> Tensor:
            seen.append(float(sigma))
            return x

        for _ in SAMPLERS[request.sampler](record, torch.zeros(1), grid.sigmas, generator=torch.Generator()):
            pass
        base = sum(sigma >= switch for sigma in seen)
        for name, count in (("base", base), ("refiner", len(seen) - base)):
            if count == 0 and request.switch != 1.0:
                first, last = float(grid.sigmas[0]), seen[-1]
                raise InputError(
                    f"with the switch at sigma {switch:.4g} the {name} would run 0 steps: "
                    f"expected a level between {last:.4g} and {first:.4g}, the ends of this schedule"
                )
        return EnsemblePlan(grid, switch, (base, len(seen) - base))

    @torch.no_grad()
    def steps(self, request: EnsembleRequest) -> Iterator[Step]:
        """The algorithm: draw noise, encode the prompt for each expert, denoise step by step."""
        r, (grid, switch, _) = request, self.plan(request)
        x, generator = self.base.first_noise(r, grid)
        size = (x.shape[2] * self.base.vae_scale_factor, x.shape[3] * self.base.vae_scale_factor)
        base, refiner = (each.denoiser(r, grid, len(x), size) for each in (self.base, self.refiner))
        experts = Experts(base, refiner, switch)
        yield from run(experts, r, grid.sigmas, x, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], by the base's VAE."""
        return self.base.decode(latents)


def _switch(r: EnsembleRequest, grid: Grid) -> float:
    """The lowest level that is the base's. InputError for several units, or a value outside its range."""
    if sum(each is not None for each in (r.switch, r.switch_sigma, r.switch_step)) > 1:
        raise InputError("switch, switch_sigma and switch_step are three units of one thing: give one of them")
    if r.switch_sigma is not None:
        return r.switch_sigma
    if r.switch_step is not None:
        if not 0 < r.switch_step < len(grid.timesteps):
            steps = len(grid.timesteps) - 1
            raise InputError(f"switch_step {r.switch_step}: one expert would run 0 steps: expected from 1 to {steps}")
        return float(
            torch.nextafter(grid.sigmas[r.switch_step], torch.tensor(torch.inf))
        )  # that level is the refiner's
    share = 0.8 if r.switch is None else r.switch
    if not 0 < share <= 1:
        raise InputError(f"switch is a share of the training steps, above 0 and at most 1, found {share}")
    return NoiseSchedule().switch_sigma(share)
