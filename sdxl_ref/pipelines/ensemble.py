"""The ensemble of experts: the base denoises down to a level, the refiner from there, inside one run of the solver
(Balaji et al. 2022, arXiv:2211.01324; Podell et al. 2023, arXiv:2307.01952, section 2.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion.schedule import Grid, NoiseSchedule
from sdxl_ref.diffusion.steps import Denoise
from sdxl_ref.pipelines.calling import CallablePipeline, Steps
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.model import check_kind
from sdxl_ref.pipelines.pipeline import Pipeline, sample
from sdxl_ref.pipelines.plans import plan_of
from sdxl_ref.pipelines.request import Request, option, own_settings
from sdxl_ref.pipelines.starts import start_of
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import WHERE

SHARE = 0.8  # of the training steps that are the base's


@dataclass(frozen=True, kw_only=True, eq=False)
class EnsembleRequest(Request):
    """Where the refiner takes over, in one of three units."""

    switch: float | None = option("hand-off after this share of the training steps, in (0, 1]; None: 0.8", None)
    switch_sigma: float | None = option("the lowest noise level that is the base's, instead", None)
    switch_step: int | None = option("the number of steps that start in the base, instead", None)


class EnsemblePlan(NamedTuple):
    """The levels, the level from which upwards the base evaluates, and how often each network will."""

    grid: Grid
    switch: float
    evaluations: tuple[int, int]  # base, refiner; the second halves of second-order steps included
    note: str = ""

    def __str__(self) -> str:
        steps = self.grid.steps_above(self.switch)
        first, at_switch, last = (float(self.grid.sigmas[i]) for i in (0, steps, -1))
        base = f"base {self.evaluations[0]} evaluations, sigma {first:.4g} → {at_switch:.4g}"
        return f"{base}; refiner {self.evaluations[1]}, {at_switch:.4g} → {last:.4g}{self.note}"


@dataclass(frozen=True)
class Experts:
    """An ensemble of experts as one denoiser: `base` owns every sigma from `switch` upwards, `refiner` those below.

    The sampler does not know: its history and its half steps go through the hand-off undisturbed.
    """

    base: Denoise
    refiner: Denoise
    switch: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        expert = self.base if float(sigma) >= self.switch else self.refiner
        return expert(x, sigma)


def _part_of_base(name: str) -> Any:
    """An attribute that is read from, and written to, the base."""
    return property(
        lambda self: getattr(self.base, name),
        lambda self, part: setattr(self.base, name, part),
        doc=f"The base's `{name}`.",
    )


class EnsemblePipeline(CallablePipeline):
    """A base and a refiner as one. What a pipeline has (`unet`, `vae`, `config`, `device`, …) is the base's.

    `wrap_denoiser` may be set to a function around the `denoise(x, sigma)` that both experts make together; those of
    `base` and `refiner` are around each one's own.
    """

    request_type = EnsembleRequest
    unet = _part_of_base("unet")
    vae = _part_of_base("vae")
    text_encoder = _part_of_base("text_encoder")
    text_encoder_2 = _part_of_base("text_encoder_2")
    config = _part_of_base("config")
    defaults = _part_of_base("defaults")
    device = _part_of_base("device")
    dtype = _part_of_base("dtype")

    def __init__(self, base: Pipeline, refiner: Pipeline) -> None:
        super().__init__()
        check_kind("base", base.config)
        check_kind("refiner", refiner.config)
        if base.config.vae.scale_factor != refiner.config.vae.scale_factor:
            scales = f"{base.config.vae.scale_factor} and {refiner.config.vae.scale_factor}"
            raise InputError(f"expected a base and a refiner of one latent space, found latents scaled by {scales}")
        self.base = base
        self.refiner = refiner

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | Checkpoint | Pipeline,
        refiner: str | Path | Checkpoint | Pipeline,
        *,
        low_memory: bool = False,
        **options: Any,
    ) -> "EnsemblePipeline":
        """Open two models; names and `options` as in `Pipeline.from_pretrained`. The refiner uses the base's VAE.

        low_memory: one set of weights in memory at a time, each read when it works and dropped for the next.
        """
        if "unet" in options:
            raise InputError(
                "the two models have a UNet each: hand them to each pipeline, and these to EnsemblePipeline"
            )
        if low_memory and not all(isinstance(model, str | Path | Checkpoint) for model in (base, refiner)):
            raise InputError("low_memory is for models that are opened here: open these with offload=Offload(device)")
        if isinstance(refiner, str | Path | Checkpoint):  # a wrong file is found out before the base is read
            where = {key: options[key] for key in WHERE if key in options} | {"vae": True}  # the base's decodes
            refiner = ImageToImagePipeline.open(refiner, **where)
            check_kind("refiner", refiner.config, refiner.path)
        if low_memory:
            options["offload"] = Offload(options.get("device", "cpu"))
        if not isinstance(base, Pipeline):
            base = TextToImagePipeline.from_pretrained(base, **options)
        if not isinstance(refiner, Pipeline):
            refiner = ImageToImagePipeline.from_pretrained(refiner, **{**options, "vae": base.vae})
        return cls(base, refiner)

    from_single_file = from_pretrained

    def models(self) -> Sequence[Pipeline]:
        return [self.base, self.refiner]

    def unconditional(self, request: Request) -> str:
        """What each expert's negative side reads, in words."""
        return "; ".join(f"{model.config.kind} {model.unconditional(request)}" for model in self.models())

    def to(self, *args: Any, **kwargs: Any) -> "EnsemblePipeline":
        """Move both to a device, a dtype or both; a dtype leaves the VAE as it is."""
        self.base.to(*args, **kwargs)
        self.refiner.to(*args, **kwargs)
        return self

    def plan(self, request: EnsembleRequest) -> EnsemblePlan:
        return self.plan_for(request, self.defaults, self.refiner.defaults)

    @staticmethod
    def plan_for(request: EnsembleRequest, defaults: Defaults = SDXL, refiner: Defaults = SDXL) -> EnsemblePlan:
        """Who evaluates where, by running the solver on nothing.

        `defaults` are the base's: a run has one sampler and one grid. Those of the refiner that differ are told.
        InputError where one expert would run 0 steps.
        """
        r = request.completed(defaults)
        grid, _, note = plan_of(request, defaults)
        switch = switch_level(r, grid)
        levels: list[float] = []

        def record(x: Tensor, sigma: Tensor) -> Tensor:
            levels.append(float(sigma))
            return x

        for _ in sample(r, record, torch.zeros(1), grid.sigmas, torch.Generator()):
            pass
        base = len([sigma for sigma in levels if sigma >= switch])
        for name, count in (("base", base), ("refiner", len(levels) - base)):
            if count == 0 and r.switch != 1.0:
                raise InputError(
                    f"with the switch at sigma {switch:.4g} the {name} would run 0 steps: expected a level between "
                    f"{min(levels):.4g} and {max(levels):.4g}, the lowest and the highest that is evaluated"
                )
        if refiner != SDXL:
            note += own_settings().not_used(request, defaults, refiner)
        return EnsemblePlan(grid, switch, (base, len(levels) - base), note)

    @torch.no_grad()
    def steps(self, request: EnsembleRequest) -> Steps:
        """The algorithm: noise a picture or draw noise, encode the prompt for each expert, denoise, decode."""
        r = request.completed(self.defaults)
        grid, switch, *_ = self.plan(r)
        start = start_of(self.base, r, grid)  # x (b,4,h,w)
        experts: list[Denoise] = []
        for model in self.models():
            own = r if model is self.base else replace(r, prompt_2=None, negative_prompt_2=None)
            text = model.encode_request(own, len(start.x))
            experts.append(model.wrapped(model.conditioned(own, text, start.x, grid)))
        base, refiner = experts
        denoise = self.wrapped(Experts(base, refiner, switch))
        if start.mask is not None:
            denoise = start.mask.around(denoise)
        for step in sample(r, denoise, start.x, grid.sigmas, start.generator):
            yield step
        return self.finished(r, step, start.mask)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], by the base's VAE."""
        return self.base.decode(latents)


def switch_level(r: EnsembleRequest, grid: Grid) -> float:
    """The lowest level that is the base's. InputError for several units, or a value outside its range."""
    if [r.switch, r.switch_sigma, r.switch_step].count(None) < 2:
        raise InputError("switch, switch_sigma and switch_step are three units of one thing: give one of them")
    if r.switch_sigma is not None:
        return r.switch_sigma
    if r.switch_step is not None and r.s_churn:
        raise InputError("s_churn moves the levels that switch_step counts: use switch or switch_sigma with it")
    if r.switch_step is not None:
        steps = len(grid.timesteps) - 1
        if not 0 < r.switch_step <= steps:
            raise InputError(f"switch_step {r.switch_step}: one expert would run 0 steps: expected from 1 to {steps}")
        just_above = torch.nextafter(grid.sigmas[r.switch_step], torch.tensor(torch.inf))
        return float(just_above)  # the level itself is the refiner's
    share = SHARE if r.switch is None else r.switch
    if not 0 < share <= 1:
        raise InputError(f"switch is a share of the training steps, above 0 and at most 1, found {share}")
    return NoiseSchedule().switch_sigma(share)
