"""What every pipeline has: its parts, where they come from, where they run, and how results leave."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from sdxl_ref.checkpoint import Checkpoint, open_checkpoint, prefixes
from sdxl_ref.conditioning import Numbers, condition, encode_text
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.diffusion.denoiser import Denoise, Denoiser
from sdxl_ref.diffusion.samplers import SAMPLERS, Step
from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.networks.vae import Posterior
from sdxl_ref.noise import Generator

Self = TypeVar("Self", bound="Pipeline")
Size = tuple[int, int]
Prompt = str | Sequence[str]
Dtype = torch.dtype | None
KINDS = {"refiner": "refiner (one text encoder, aesthetic score)", "base": "base (two text encoders, target size)"}
UNUSABLE = {
    "refiner": ("prompt_2", "negative_prompt_2", "target_size", "negative_target_size"),
    "base": ("aesthetic_score", "negative_aesthetic_score"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a run, with the ecosystem's names and defaults. Sizes are (height, width)."""

    prompt: Prompt
    prompt_2: Prompt | None = None  # base only, for the second text encoder; None: as prompt
    negative_prompt: Prompt | None = None  # None: the empty prompt on a refiner, zeros on a base
    negative_prompt_2: Prompt | None = None  # base only; None: as negative_prompt
    num_inference_steps: int = 50
    guidance_scale: float = 5.0  # at most 1: no guidance, and the negative side does not run
    guidance_rescale: float = 0.0
    generator: Generator | None = None  # None: seeded by the operating system, one per image
    latents: Tensor | None = None  # (b,4,h,w), what the run starts from: see each pipeline
    num_images_per_prompt: int = 1
    original_size: Size | None = None  # None: the picture's own
    crops_coords_top_left: Size = (0, 0)
    negative_original_size: Size | None = None  # None: as original_size
    negative_crops_coords_top_left: Size | None = None  # None: see `Pipeline.numbers`
    target_size: Size | None = None  # base only
    negative_target_size: Size | None = None  # base only
    aesthetic_score: float | None = None  # refiner only; None: 6.0
    negative_aesthetic_score: float | None = None  # refiner only; None: 2.5
    sampler: str = "euler"
    spacing: str = "leading"
    karras: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InputError(f"unknown sampler {self.sampler!r}: expected one of {', '.join(SAMPLERS)}")
        for name in ("guidance_scale", "aesthetic_score", "negative_aesthetic_score"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise InputError(f"{name} must be a finite number, found {getattr(self, name)}")
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale must be from 0 to 1, found {self.guidance_rescale}")
        if self.num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, found {self.num_images_per_prompt}")


class Plan(NamedTuple):
    """The levels that will be denoised, known before anything runs."""

    grid: Grid
    num_inference_steps: int

    def __str__(self) -> str:
        first, last = float(self.grid.sigmas[0]), float(self.grid.sigmas[-1])
        return f"{len(self.grid.timesteps)} of {self.num_inference_steps} steps, sigma {first:.4g} → {last:.4g}"


class Pipeline:
    """The networks of one checkpoint. `text_encoder` is CLIP-L (None on a refiner), `text_encoder_2` OpenCLIP bigG.

    Every part may be replaced (compiled, fine-tuned); it is looked up when a run starts.
    """

    kind: str  # "base" or "refiner": what it runs
    request_type: type[Any]

    def __init__(
        self, config: ModelConfig, unet: Module, vae: Module, text_encoder_2: Module, text_encoder: Module | None = None
    ) -> None:
        self.check(config)
        self.config, self.unet, self.vae = config, unet, vae
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.checkpoint: Checkpoint | None = None
        self.vae_scale_factor = int(2 ** (len(config.vae.ch_mult) - 1))  # how many times smaller a latent's side is

    @classmethod
    def check(cls, config: ModelConfig, path: str | Path = "") -> None:
        """InputError where this pipeline cannot run a model of this configuration."""
        if config.kind != cls.kind:
            raise InputError(f"expected a {KINDS[cls.kind]}, found an SDXL {config.kind}" + f": {path}" * bool(path))

    @classmethod
    def open(cls, path: str | Path, variant: str | None = None) -> Checkpoint:
        """Open a file, a folder, "pocket", or a repository of the hub. InputError unless this pipeline can run it."""
        if not os.path.exists(path):
            from sdxl_ref.hub import resolve

            path = resolve(path, cls.kind, variant=variant)
        checkpoint = open_checkpoint(path, variant)
        cls.check(checkpoint.config, path)
        return checkpoint

    @classmethod
    def from_single_file(
        cls: type[Self],
        path: str | Path | Checkpoint,
        *,
        torch_dtype: Dtype = None,
        dtype: Dtype = None,
        device: Any = "cpu",
        slot: Any = None,
        variant: str | None = None,
        **parts: Module,
    ) -> Self:
        """Load a model (see `open`; or an open one) as float32 by default; the VAE always, which overflows in float16.

        `parts` (`vae=`, `text_encoder_2=`, …) are shared instead of loaded; with a `slot` (of `on_demand`) each part
        is read when it works and dropped for the next.
        """
        checkpoint = path if isinstance(path, Checkpoint) else cls.open(path, variant)
        cls.check(checkpoint.config, checkpoint.path)
        dtype = dtype or torch_dtype or torch.float32
        for part in prefixes(checkpoint.config):
            if part not in parts:
                load = checkpoint.load if slot is None else slot.later(checkpoint)
                parts[part] = load(part, torch.float32 if part == "vae" else dtype, device)
        pipeline = cls(checkpoint.config, **parts)
        pipeline.checkpoint = checkpoint
        return pipeline

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a dtype or both, as `torch.nn.Module.to`; a dtype leaves the VAE as it is."""
        for part in (self.unet, self.text_encoder, self.text_encoder_2):
            if part is not None:
                part.to(*args, **kwargs)
        self.vae.to(self.device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def denoiser(self, request: Request, grid: Grid, count: int, size: Size) -> Denoiser:
        """Encode the prompts for `count` pictures of `size`, both sides in one batch, and bind them to the UNet.

        Without a negative prompt the negative side is zeros on a base, and the empty prompt on a refiner.
        """
        r, kind = request, self.config.kind
        for name in UNUSABLE[kind] if type(r) is self.request_type else ():  # an ensemble's request serves both kinds
            if getattr(r, name) is not None:
                raise InputError(f"{name} is of no use to an SDXL {kind}: leave it out")
        second = r.prompt if kind == "refiner" or r.prompt_2 is None else r.prompt_2
        prompts, prompts_2 = per_image(r.prompt, count), per_image(second, count)
        zeros = kind == "base" and r.negative_prompt is None and r.negative_prompt_2 is None
        if r.guidance_scale > 1 and not zeros:
            negative = r.negative_prompt or ""
            prompts += per_image(negative, count)
            second = negative if kind == "refiner" or r.negative_prompt_2 is None else r.negative_prompt_2
            prompts_2 += per_image(second, count)
        context, pooled = encode_text(self.text_encoder, self.text_encoder_2, prompts, prompts_2)
        check_finite("the text encoder", context)
        check_finite("the text encoder's pooled vector", pooled)
        numbers, negative_numbers = (each.tensor(kind) for each in self.numbers(r, size))
        positive = condition(context[:count], pooled[:count], numbers)
        if r.guidance_scale <= 1:
            return Denoiser(self.unet, grid, positive)
        if zeros:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        other = condition(context[-count:], pooled[-count:], negative_numbers)
        return Denoiser(self.unet, grid, positive, other, r.guidance_scale, r.guidance_rescale)

    def numbers(self, request: Request, size: Size) -> tuple[Numbers, Numbers]:
        """Sizes and scores of both sides. What is not given is the picture's size, and the same on both sides.

        Yet the negative crop is (0, 0) for image-to-image, and where another negative size is given.
        """
        r, original, target = request, request.original_size or size, request.target_size or size
        score = 6.0 if r.aesthetic_score is None else r.aesthetic_score
        negative_score = 2.5 if r.negative_aesthetic_score is None else r.negative_aesthetic_score
        own = hasattr(r, "image") or r.negative_original_size is not None or r.negative_target_size is not None
        crop = r.negative_crops_coords_top_left or ((0, 0) if own else r.crops_coords_top_left)
        negative = Numbers(r.negative_original_size or original, crop, r.negative_target_size or target, negative_score)
        return Numbers(original, r.crops_coords_top_left, target, score), negative

    def encode_image(self, images: Tensor, generator: Generator, copies: int = 1) -> Tensor:
        """Pictures (n,3,H,W) in [-1,1] -> samples of their latents (n*copies,4,h,w), scaled, in float32.

        One generator draws once for each picture; a list draws for each copy from its own.
        """
        encoded = [self.vae.encode(each) for each in images.to(next(self.vae.parameters())).split(1)]  # type: ignore[operator]
        mean, logvar = torch.cat([e.mean for e in encoded]), torch.cat([e.logvar for e in encoded])
        posterior = Posterior(*(check_finite("the VAE's encoder", each) for each in (mean, logvar)))
        if isinstance(generator, list):
            posterior, copies = Posterior(*(t.repeat_interleave(copies, 0) for t in (mean, logvar))), 1
        latents = posterior.sample(generator).repeat_interleave(copies, 0)
        return latents.float() * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], one at a time to save memory."""
        scaled = (latents / self.config.vae.scale_factor).to(next(self.vae.parameters()))
        images = torch.cat([self.vae.decode(each) for each in scaled.split(1)])  # type: ignore[operator]
        return (check_finite("the VAE's decoder", images).float() * 0.5 + 0.5).clamp(0, 1)


def run(denoise: Denoise, r: Request, sigmas: Tensor, x: Tensor, generator: Generator) -> Iterator[Step]:
    """Run the request's sampler from x (b,4,h,w), which stands at the first of `sigmas`."""
    for step in SAMPLERS[r.sampler](denoise, x, sigmas, generator=generator):
        check_finite(f"the UNet, on the step to sigma {float(step.sigma):.4g},", step.x)
        yield step


def per_image(prompt: Prompt, count: int) -> list[str]:
    """One prompt for each of `count` images; each given one serves the same number of images in a row."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or count % len(prompts):
        raise InputError(f"expected one prompt, or one for each image, found {len(prompts)} for {count}")
    return [each for each in prompts for _ in range(count // len(prompts))]


def check_finite(stage: str, tensor: Tensor) -> Tensor:
    """The tensor itself; InputError that names the stage where a value is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        hint = "check the weights with `sdxl-ref info --check`, or use another dtype (the VAE overflows in float16)"
        raise InputError(f"{stage} returned values that are not finite (NaN or infinite): {hint}")
    return tensor
