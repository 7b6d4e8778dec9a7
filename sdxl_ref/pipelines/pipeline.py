"""What every pipeline has: its parts, where they come from, where they run, and how results leave."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sdxl_ref.checkpoint import Checkpoint, open_checkpoint, prefixes
from sdxl_ref.conditioning import Numbers, encode
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser
from sdxl_ref.diffusion.samplers import SAMPLERS, Step
from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.images import from_tensor
from sdxl_ref.networks.vae import Posterior
from sdxl_ref.noise import Generator

Self = TypeVar("Self", bound="Pipeline")
Size = tuple[int, int]
Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UNUSABLE = {"refiner": ("prompt_2", "negative_prompt_2", "target_size", "negative_target_size")}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a run, with the ecosystem's names and defaults. Sizes are (height, width)."""

    prompt: str | Sequence[str]
    prompt_2: str | Sequence[str] | None = None  # base only, for the second text encoder
    negative_prompt: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None  # base only
    num_inference_steps: int = 50
    guidance_scale: float = 5.0  # at most 1: no guidance, and the negative side does not run
    guidance_rescale: float = 0.0
    generator: Generator | None = None  # None: seeded by the operating system, one per image
    latents: Tensor | None = None  # (b,4,h,w) in sigma space
    num_images_per_prompt: int = 1
    original_size: Size | None = None  # None: the picture's own
    crops_coords_top_left: Size = (0, 0)
    negative_original_size: Size | None = None  # None: as original_size
    negative_crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None  # base only
    negative_target_size: Size | None = None  # base only
    aesthetic_score: float | None = None  # refiner only; None: 6.0
    negative_aesthetic_score: float | None = None  # refiner only; None: 2.5
    sampler: str = "euler"
    spacing: str = "leading"
    karras: bool = False


class PipelineOutput(NamedTuple):
    images: Any  # as `output_type` says: PIL pictures, (b,H,W,3) array, (b,3,H,W) tensor, or latents (b,4,h,w)


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

    def __init__(
        self,
        config: ModelConfig,
        unet: nn.Module,
        vae: nn.Module,
        text_encoder_2: nn.Module,
        text_encoder: nn.Module | None = None,
    ) -> None:
        self.check(config)
        self.config, self.unet, self.vae = config, unet, vae
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.checkpoint: Checkpoint | None = None

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """InputError where this pipeline cannot run a model of this configuration."""
        raise NotImplementedError

    @classmethod
    def from_single_file(
        cls: type[Self],
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **parts: nn.Module,
    ) -> Self:
        """Open a safetensors file in the official layout. `dtype` (or `torch_dtype`) is float32 unless given.

        The VAE is float32 whatever the dtype: it overflows in float16. `parts` (`vae=`, `text_encoder_2=`, …) are
        shared instead of loaded. Raises InputError as `open_checkpoint` does, and for a model this pipeline cannot run.
        """
        checkpoint = open_checkpoint(path)
        cls.check(checkpoint.config)
        dtype = dtype or torch_dtype or torch.float32
        for part in prefixes(checkpoint.config):
            if part not in parts:
                parts[part] = checkpoint.load(part, torch.float32 if part == "vae" else dtype, device)
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

    @property
    def vae_scale_factor(self) -> int:
        """How many times smaller a latent's side is than the picture's: 8 for the official VAE."""
        return int(2 ** (len(self.config.vae.ch_mult) - 1))

    def check_request(self, request: Request) -> None:
        """InputError where an argument is given that the model at hand cannot use."""
        for name in UNUSABLE[self.config.kind]:
            if getattr(request, name) is not None:
                raise InputError(f"{name} is of no use to an SDXL {self.config.kind}: leave it out")

    def denoise(self, request: Request, grid: Grid, x: Tensor, generator: Generator) -> Iterator[Step]:
        """Encode the prompt and run the sampler from x (b,4,h,w), which stands at the grid's first level."""
        r, size = request, (x.shape[2] * self.vae_scale_factor, x.shape[3] * self.vae_scale_factor)
        score = 6.0 if r.aesthetic_score is None else r.aesthetic_score
        negative_score = 2.5 if r.negative_aesthetic_score is None else r.negative_aesthetic_score
        numbers = Numbers(r.original_size or size, r.crops_coords_top_left, None, score)
        negative_size = r.negative_original_size or numbers.original_size
        negative_numbers = Numbers(negative_size, r.negative_crops_coords_top_left, None, negative_score)
        positive = self._condition(r.prompt, numbers, len(x))
        guided = r.guidance_scale > 1
        negative = self._condition(r.negative_prompt or "", negative_numbers, len(x)) if guided else None
        denoise = Denoiser(self.unet, grid, positive, negative, r.guidance_scale, r.guidance_rescale)
        for step in SAMPLERS[r.sampler](denoise, x, grid.sigmas, generator=generator):
            check_finite(f"the UNet, on the step to sigma {float(step.sigma):.4g},", step.x)
            yield step

    def _condition(self, prompt: str | Sequence[str], numbers: Numbers, count: int) -> Conditioning:
        """Conditioning of `count` images; each prompt serves the same number of images in a row."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if count % len(prompts):
            raise InputError(f"expected one prompt, or one for each image, found {len(prompts)} for {count}")
        one = encode(self.text_encoder_2, prompts, numbers)
        check_finite("the text encoder", one.context)
        check_finite("the text encoder's pooled vector", one.y)
        repeats = count // len(prompts)
        return Conditioning(one.context.repeat_interleave(repeats, 0), one.y.repeat_interleave(repeats, 0))

    def encode_image(self, images: Tensor, generator: Generator, copies: int = 1) -> Tensor:
        """Pictures (n,3,H,W) in [-1,1] -> samples of their latents (n*copies,4,h,w), scaled, in float32.

        One generator draws once for each picture; a list draws for each copy from its own.
        """
        encoded = [self.vae.encode(each) for each in images.to(next(self.vae.parameters())).split(1)]  # type: ignore[operator]
        mean, logvar = torch.cat([e.mean for e in encoded]), torch.cat([e.logvar for e in encoded])
        posterior = Posterior(check_finite("the VAE's encoder", mean), logvar)
        if isinstance(generator, list):
            posterior, copies = Posterior(*(t.repeat_interleave(copies, 0) for t in (mean, logvar))), 1
        latents = posterior.sample(generator).repeat_interleave(copies, 0)
        return latents.float() * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], one at a time to save memory."""
        scaled = (latents / self.config.vae.scale_factor).to(next(self.vae.parameters()))
        images = torch.cat([self.vae.decode(each) for each in scaled.split(1)])  # type: ignore[operator]
        return (check_finite("the VAE's decoder", images) * 0.5 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def finish(self, steps: Iterator[Step], output_type: str, callback: Callback | None) -> PipelineOutput:
        """Drain a run, call `callback(pipeline, i, sigma, {"latents": x})` after each step, and pack the result.

        A callback may return {"latents": …}: the run goes on from these.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        for i, step in enumerate(steps):
            if callback is not None:
                changed = callback(self, i, float(step.sigma), {"latents": step.x})
                step.x.copy_((changed or {}).get("latents", step.x))
        if output_type == "latent":
            return PipelineOutput(step.x)
        images = self.decode(step.x)
        if output_type == "pt":
            return PipelineOutput(images)
        if output_type == "np":
            return PipelineOutput(images.float().cpu().permute(0, 2, 3, 1).numpy())  # (b,3,h,w) -> (b,h,w,3)
        return PipelineOutput(from_tensor(images))


def check_finite(stage: str, tensor: Tensor) -> Tensor:
    """The tensor itself; InputError that names the stage where a value is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        hint = "check the weights with `sdxl-ref info --check`, or use another dtype (the VAE overflows in float16)"
        raise InputError(f"{stage} returned values that are not finite (NaN or infinite): {hint}")
    return tensor
