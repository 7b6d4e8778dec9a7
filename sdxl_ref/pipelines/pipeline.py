"""What the pipelines of one model share: its parts, where they come from and run, and the stages of a run."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from sdxl_ref.config import SDXL, InputError, ModelConfig, unknown
from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser, Prediction
from sdxl_ref.diffusion.guidance import Guidance
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.diffusion.steps import Denoise, Step
from sdxl_ref.networks.vae import Posterior
from sdxl_ref.noise import Generator
from sdxl_ref.pipelines.calling import CallablePipeline
from sdxl_ref.pipelines.request import Prompt, Request, Size, guidance_schedule
from sdxl_ref.text.conditioning import Numbers, PromptEmbeds, conditioning_of, encode_text
from sdxl_ref.weights.checkpoint import PARTS, Checkpoint, prefixes
from sdxl_ref.weights.opening import open_checkpoint

if TYPE_CHECKING:
    from sdxl_ref.weights.offload import Offload

Self = TypeVar("Self", bound="Pipeline")
Dtype = torch.dtype | None
KINDS = {"refiner": "refiner (one text encoder, aesthetic score)", "base": "base (two text encoders, target size)"}
UNUSABLE = {  # fields of a request, by kind of model
    "refiner": ("prompt_2", "negative_prompt_2", "target_size", "negative_target_size"),
    "base": ("aesthetic_score", "negative_aesthetic_score"),
}
SCORE = 6.0
NEGATIVE_SCORE = 2.5


class GridPlan(NamedTuple):
    """The levels that will be denoised, known before anything runs."""

    grid: Grid
    num_inference_steps: int
    note: str = ""

    def __str__(self) -> str:
        first = float(self.grid.sigmas[0])
        last = float(self.grid.sigmas[-1])
        steps = f"{len(self.grid.timesteps)} of {self.num_inference_steps} steps, sigma {first:.4g} → {last:.4g}"
        return steps + self.note


class Pipeline(CallablePipeline):
    """The networks of one checkpoint. `text_encoder` is CLIP-L (None on a refiner), `text_encoder_2` OpenCLIP bigG.

    Every part may be replaced (compiled, fine-tuned); it is looked up when a run starts. `wrap_denoiser` may be set to
    a function that takes the run's `denoise(x, sigma)` and returns another one: guidance is such a function inside it.
    """

    kind: str  # "base" or "refiner": what it runs

    def __init__(
        self, config: ModelConfig, unet: Module, vae: Module, text_encoder_2: Module, text_encoder: Module | None = None
    ) -> None:
        super().__init__()
        self.check(config)
        self.config = config
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.checkpoint: Checkpoint | None = None
        self.defaults = SDXL
        self.offload: Offload | None = None  # where parts come when they work
        self.vae_scale_factor = int(2 ** (len(config.vae.ch_mult) - 1))  # how many times smaller a latent's side is

    @classmethod
    def check(cls, config: ModelConfig, path: str | Path = "") -> None:
        """InputError where this pipeline cannot run a model of this configuration."""
        if config.kind != cls.kind:
            where = f": {path}" if path else ""
            raise InputError(f"expected a {KINDS[cls.kind]}, found an SDXL {config.kind}{where}")

    @classmethod
    def open(cls, name: str | Path | Checkpoint, variant: str | None = None, **hub: Any) -> Checkpoint:
        """Open a checkpoint without reading its weights. InputError unless this pipeline can run it."""
        checkpoint = open_checkpoint(name, cls.kind, variant=variant, **hub)
        cls.check(checkpoint.config, checkpoint.path)
        return checkpoint

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path | Checkpoint,
        *,
        variant: str | None = None,
        torch_dtype: Dtype = None,
        dtype: Dtype = None,
        vae_dtype: Dtype = None,
        device: Any = "cpu",
        prediction: str | None = None,
        offload: "Offload | None" = None,
        use_safetensors: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **parts: Any,
    ) -> Self:
        """Open a file, a folder in diffusers' layout, "pocket", a repository of the hub, or an open checkpoint.

        Weights are float32 unless `dtype` (or `torch_dtype`) says otherwise; the VAE's, which overflows in float16,
        at least float32 unless `vae_dtype` does. `variant` ("fp16") picks files such as `model.fp16.safetensors`.
        `prediction` ("epsilon" or "v") is what the UNet returns, in place of what the file says. `parts` (`vae=`,
        `text_encoder_2=`, …) are shared instead of loaded; `vae` may also be the path of one. With `offload`, an
        `Offload`, each part is read when it works and dropped for the next.
        """
        if not use_safetensors:
            raise InputError("only safetensors files are opened, never a pickle: leave use_safetensors=False out")
        hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        for part in parts:
            if part not in PARTS:
                options = inspect.signature(cls.from_pretrained).parameters.values()
                names = [option.name for option in options if option.kind is option.KEYWORD_ONLY]
                raise TypeError(f"{cls.__name__}: {unknown('argument', part, [*PARTS, *names])}")
        checkpoint = cls.open(name, variant, vae=parts.get("vae"), **hub)
        if isinstance(parts.get("vae"), str | Path):
            del parts["vae"]  # it is the checkpoint's now
        config = checkpoint.config
        if prediction is not None:
            config = replace(config, prediction=prediction)
        if "vae" in parts:  # its scale, and what it makes of a picture
            config = replace(config, vae=getattr(parts["vae"], "config", config.vae))
        dtype = dtype or torch_dtype or torch.float32
        if unusable := parts.keys() - prefixes(config).keys():
            raise InputError(f"an SDXL {config.kind} has no {' and no '.join(sorted(unusable))}: leave it out")
        for part in prefixes(config):
            if part in parts:
                continue
            part_dtype = vae_dtype or torch.promote_types(dtype, torch.float32) if part == "vae" else dtype
            if offload is None:
                parts[part] = checkpoint.load(part, part_dtype, device)
            else:
                parts[part] = offload.read(checkpoint, part, part_dtype)
        pipeline = cls(config, **parts)
        pipeline.checkpoint = checkpoint
        pipeline.defaults = checkpoint.defaults
        pipeline.offload = offload
        return pipeline

    from_single_file = from_pretrained

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a dtype or both, as `torch.nn.Module.to`; a dtype leaves the VAE as it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if self.offload is not None and device is not None:
            raise InputError("the parts come to a device when they work, and cannot be moved to another one")
        for network in (self.unet, self.text_encoder, self.text_encoder_2):
            if network is not None:
                network.to(device=device, dtype=dtype)
        self.vae.to(device=device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        if self.offload is not None:
            return self.offload.device
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def zeros(self) -> bool:
        """Whether no negative prompt means zeros, and not the empty prompt."""
        return self.config.kind == "base" if self.defaults.zeros is None else self.defaults.zeros

    def unconditional(self, request: Request) -> str:
        """What the negative side of a request reads, in words."""
        if request.negative_prompt is None and request.negative_prompt_2 is None:
            return "zeros" if self.zeros else "empty prompt encoded"
        return "negative prompt encoded"

    def picture_size(self, latents: Tensor) -> Size:
        """(height, width) in pixels of the pictures that latents (b,4,h,w) decode to."""
        return latents.shape[2] * self.vae_scale_factor, latents.shape[3] * self.vae_scale_factor

    def refuse_unusable(self, request: Request) -> None:
        """InputError where a request has what this kind of model has no use for."""
        for name in UNUSABLE[self.config.kind]:
            if getattr(request, name) is not None:
                raise InputError(f"{name} is of no use to an SDXL {self.config.kind}: leave it out")

    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt | None = None,
        *,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
    ) -> PromptEmbeds:
        """What the UNet reads of n prompts, for b = n * num_images_per_prompt pictures, on both sides.

        Without a negative prompt the negative side is zeros on a base, and the empty prompt on a refiner, unless the
        model's settings say otherwise (`force_zeros_for_empty_prompt`). A negative prompt is one text, or as many as
        divide b. InputError where the numbers do not go together.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts) * num_images_per_prompt
        zeros = self.zeros and negative_prompt is None and negative_prompt_2 is None
        texts = per_image(prompts, count)
        texts_2 = per_image(prompts if prompt_2 is None else prompt_2, count)
        if do_classifier_free_guidance and not zeros:
            negative = "" if negative_prompt is None else negative_prompt
            texts += per_image(negative, count)
            texts_2 += per_image(negative if negative_prompt_2 is None else negative_prompt_2, count)
        context, pooled = encode_text(self.text_encoder, self.text_encoder_2, texts, texts_2, self.device)
        check_finite("the text encoder", context)
        check_finite("the text encoder's pooled vector", pooled)
        if not do_classifier_free_guidance:
            return PromptEmbeds(context, None, pooled, None)
        if zeros:
            return PromptEmbeds(context, torch.zeros_like(context), pooled, torch.zeros_like(pooled))
        return PromptEmbeds(context[:count], context[count:], pooled[:count], pooled[count:])

    def sizes(self, request: Request, size: Size) -> tuple[Numbers, Numbers]:
        """What the UNet is told besides the prompt, of pictures of this size: the positive and the negative side.

        What is not given is the picture's size, and the same on both sides. Yet the negative crop is (0, 0) where
        another negative size is given.
        """
        r = request
        original = r.original_size or size
        target = r.target_size or size
        score = SCORE if r.aesthetic_score is None else r.aesthetic_score
        negative_score = NEGATIVE_SCORE if r.negative_aesthetic_score is None else r.negative_aesthetic_score
        own_size = r.negative_original_size is not None or r.negative_target_size is not None
        crop = r.negative_crops_coords_top_left or ((0, 0) if own_size else r.crops_coords_top_left)
        negative_original = r.negative_original_size or original
        negative_target = r.negative_target_size or target
        positive = Numbers(original, r.crops_coords_top_left, target, score)
        return positive, Numbers(negative_original, crop, negative_target, negative_score)

    def condition(self, request: Request, text: PromptEmbeds, size: Size) -> Conditioning:
        """Text and sizes of b pictures as the UNet reads them; with guidance both sides (2b): negative, positive."""
        positive, negative = (numbers.tensor(self.config.kind) for numbers in self.sizes(request, size))  # (k,)
        context, negative_context, pooled, negative_pooled = text
        context = context.to(self.dtype)  # a tower that pipelines share may have another one
        numbers = positive.repeat(len(pooled), 1)  # (b,k)
        if negative_context is None or negative_pooled is None:
            return conditioning_of(context, pooled, numbers)
        both_numbers = torch.cat([negative.repeat(len(pooled), 1), numbers])  # (2b,k)
        both_pooled = torch.cat([negative_pooled, pooled])  # (2b,e)
        both_context = torch.cat([negative_context.to(self.dtype), context])  # (2b,77,d)
        return conditioning_of(both_context, both_pooled, both_numbers)

    def denoiser(self, request: Request, conditioning: Conditioning, grid: Grid) -> Denoise:
        """`denoise(x, sigma)`: the UNet under its conditioning, with guidance around it where there is any."""
        denoise = Denoiser(self.unet, Prediction(self.config.prediction, grid.timestep), conditioning)
        if not request.guided:
            return denoise
        if request.schedules_guidance:
            return guidance_schedule().scheduled(request, denoise, grid)
        return Guidance(denoise, request.guidance_scale, request.guidance_rescale)

    def encode_image(self, images: Tensor, generator: Generator, copies: int = 1) -> Tensor:
        """Pictures (n,3,H,W) in [-1,1] -> samples of their latents (n*copies,4,h,w), scaled, in float32.

        One generator draws once for each picture; a list draws for each copy from its own.
        """
        dtype = next(self.vae.parameters()).dtype
        posteriors = [self.vae.encode(image) for image in images.to(self.device, dtype).split(1)]  # type: ignore[operator]
        mean = check_finite("the VAE's encoder", torch.cat([posterior.mean for posterior in posteriors]))
        logvar = check_finite("the VAE's encoder", torch.cat([posterior.logvar for posterior in posteriors]))
        if not isinstance(generator, torch.Generator):
            mean = mean.repeat_interleave(copies, 0)  # (n,4,h,w) -> (n*copies,4,h,w)
            logvar = logvar.repeat_interleave(copies, 0)
            latents = Posterior(mean, logvar).sample(generator)
        else:
            latents = Posterior(mean, logvar).sample(generator).repeat_interleave(copies, 0)
        return latents.float() * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], one at a time to save memory."""
        dtype = next(self.vae.parameters()).dtype
        scaled = (latents / self.config.vae.scale_factor).to(self.device, dtype)
        images = torch.cat([self.vae.decode(latent) for latent in scaled.split(1)])  # type: ignore[operator]
        return (check_finite("the VAE's decoder", images).float() * 0.5 + 0.5).clamp(0, 1)


def sample(request: Request, denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generator) -> Iterator[Step]:
    """The steps of the request's sampler from x (b,4,h,w), which stands at the first of `sigmas`."""
    sampler = SAMPLERS[request.sampler or SDXL.sampler]
    advice = "lower the guidance scale, " if request.guided else ""
    for step in sampler(denoise, x, sigmas, generator=generator, **request.sampler_options()):
        check_finite(f"the UNet, on the step to sigma {float(step.sigma):.4g},", step.x, advice)
        yield step


def per_image(prompt: Prompt, count: int) -> list[str]:
    """One prompt for each of `count` images; each prompt serves the same number of images in a row."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or count % len(prompts):
        raise InputError(f"expected one prompt, or one for each image, found {len(prompts)} for {count}")
    return [text for text in prompts for _ in range(count // len(prompts))]


def check_finite(stage: str, tensor: Tensor, advice: str = "") -> Tensor:
    """The tensor itself; InputError that names the stage where a value is NaN or infinite, with advice of its own."""
    if not torch.isfinite(tensor).all():
        hint = "check the weights with `sdxl-ref info --check`, or use another dtype (the VAE overflows in float16)"
        raise InputError(f"{stage} returned values that are not finite (NaN or infinite): {advice}{hint}")
    return tensor
