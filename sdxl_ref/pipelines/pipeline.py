"""A run of one model: from noise, or from a picture that is noised up to a level (SDEdit, Meng et al. 2021,
arXiv:2108.01073), down to a picture (Podell et al. 2023, arXiv:2307.01952).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.config import SDXL, InputError
from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser, Prediction
from sdxl_ref.diffusion.guidance import Guidance
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.schedule import Grid
from sdxl_ref.diffusion.steps import Denoise, Step
from sdxl_ref.networks.vae import Posterior
from sdxl_ref.noise import Generator
from sdxl_ref.pipelines.calling import Steps
from sdxl_ref.pipelines.model import Model
from sdxl_ref.pipelines.plans import plan_of
from sdxl_ref.pipelines.request import Prompt, Request, Size, guidance_schedule
from sdxl_ref.pipelines.starts import start_of
from sdxl_ref.text.conditioning import Numbers, PromptEmbeds, conditioning_of, encode_text

UNUSABLE = {  # fields of a request, by kind of model
    "refiner": ("prompt_2", "negative_prompt_2", "target_size", "negative_target_size"),
    "base": ("aesthetic_score", "negative_aesthetic_score"),
}
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_syntax", "clip_skip")
SCORE = 6.0
NEGATIVE_SCORE = 2.5


class Pipeline(Model):
    """A model's algorithm, its stages and what they say of themselves.

    `wrap_denoiser` may be set to a function that takes the run's `denoise(x, sigma)` and returns another one: guidance
    is such a function inside it.
    """

    request_type = Request
    plan_for = staticmethod(plan_of)

    @torch.no_grad()
    def steps(self, request: Request) -> Steps:
        """The algorithm: noise a picture or draw noise, encode the prompt, denoise step by step, decode."""
        r = request.completed(self.defaults)
        grid = self.plan(r).grid
        refuse_unusable(self.config.kind, r)
        start = start_of(self, r, grid)  # x (b,4,h,w)
        text = self.encode_request(r, len(start.x))
        denoise = self.wrapped(self.conditioned(r, text, start.x, grid))
        if start.mask is not None:
            denoise = start.mask.around(denoise)
        for step in sample(r, denoise, start.x, grid.sigmas, start.generator):
            yield step
        return self.finished(r, step, start.mask)

    def conditioned(self, r: Request, text: PromptEmbeds, x: Tensor, grid: Grid) -> Denoise:
        """`denoise(x, sigma)` of latents like x (b,4,h,w), whole or in parts."""
        if r.tile or r.batch_invariant:
            return self.denoiser_in_parts(r, text, x, grid)
        return self.denoiser(r, self.condition(r, text, self.picture_size(x)), grid)

    @property
    def zeros(self) -> bool:
        """Whether no negative prompt means zeros, and not the empty prompt."""
        return self.config.kind == "base" if self.defaults.zeros is None else self.defaults.zeros

    def unconditional(self, request: Request) -> str:
        """What the negative side of a request reads, in words."""
        if request.negative_prompt_embeds is not None:
            return "embeds handed in"
        reads_second = self.config.kind == "base"  # of an ensemble's request the base alone does
        if request.negative_prompt is None and not (reads_second and request.negative_prompt_2 is not None):
            return "zeros" if self.zeros else "empty prompt encoded"
        return "negative prompt encoded"

    def picture_size(self, latents: Tensor) -> Size:
        """(height, width) in pixels of the pictures that latents (b,4,h,w) decode to."""
        return latents.shape[2] * self.vae_scale_factor, latents.shape[3] * self.vae_scale_factor

    def encode_request(self, r: Request, count: int) -> PromptEmbeds:
        """What the UNet reads of a request's prompts, for `count` pictures."""
        if r.batch_invariant:
            return self.encode_apart(r, count)
        if r.prompt_embeds is not None or r.negative_prompt_embeds is not None:
            return self.own_embeds(r, count)
        texts: dict[str, Any] = {name: getattr(r, name) for name in TEXTS}
        copies = count // r.prompts
        return self.encode_prompt(**texts, num_images_per_prompt=copies, do_classifier_free_guidance=r.guided)

    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt | None = None,
        *,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        prompt_syntax: str = "plain",
        clip_skip: int | None = None,
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
        is_plain = prompt_syntax == "plain" and clip_skip is None and self.inversions is None
        encode = encode_text if is_plain else self.text_encoding(prompt_syntax, clip_skip)
        context, pooled = encode(self.text_encoder, self.text_encoder_2, texts, texts_2, self.device)
        check_finite("the text encoder", context)
        check_finite("the text encoder's pooled vector", pooled)
        if not do_classifier_free_guidance:
            return PromptEmbeds(context, None, pooled, None)
        if zeros:
            return PromptEmbeds(context, torch.zeros_like(context), pooled, torch.zeros_like(pooled))
        return PromptEmbeds(context[:count], context[count:], pooled[:count], pooled[count:])

    def sizes(self, request: Request, size: Size) -> tuple[Numbers, Numbers]:
        """What the UNet is told besides the prompt, of pictures of this size: the positive and the negative side.

        What is not given is the picture's size, and the same on both sides. Yet the negative crop is (0, 0) on a
        refiner, and in text-to-image where another negative size is given, as diffusers' pipelines have it.
        """
        r = request
        original = r.original_size or size
        target = r.target_size or size
        score = SCORE if r.aesthetic_score is None else r.aesthetic_score
        negative_score = NEGATIVE_SCORE if r.negative_aesthetic_score is None else r.negative_aesthetic_score
        own_size = r.image is None and (r.negative_original_size is not None or r.negative_target_size is not None)
        default_crop = (0, 0) if own_size or self.config.kind == "refiner" else r.crops_coords_top_left
        crop = r.negative_crops_coords_top_left or default_crop
        negative_original = r.negative_original_size or original
        negative_target = r.negative_target_size or target
        positive = Numbers(original, r.crops_coords_top_left, target, score)
        return positive, Numbers(negative_original, crop, negative_target, negative_score)

    def condition(self, request: Request, text: PromptEmbeds, size: Size) -> Conditioning:
        """Text and sizes of b pictures as the UNet reads them; with guidance both sides (2b): negative, positive."""
        positive, negative = (numbers.tensor(self.config.kind) for numbers in self.sizes(request, size))  # (k,)
        context, negative_context, pooled, negative_pooled = text
        numbers = positive.repeat(len(pooled), 1)  # (b,k)
        if negative_context is not None and negative_pooled is not None:
            context = torch.cat([negative_context, context])  # (2b,77,d)
            pooled = torch.cat([negative_pooled, pooled])  # (2b,e)
            numbers = torch.cat([negative.repeat(len(numbers), 1), numbers])  # (2b,k)
        return conditioning_of(context.to(self.dtype), pooled, numbers)  # a tower that is shared has its own dtype

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
        posteriors = [self.autoencoder.encode(image) for image in images.to(self.device, dtype).split(1)]
        mean = check_finite("the VAE's encoder", torch.cat([posterior.mean for posterior in posteriors]))
        logvar = check_finite("the VAE's encoder", torch.cat([posterior.logvar for posterior in posteriors]))
        own = copies if isinstance(generator, list) else 1
        posterior = Posterior(mean.repeat_interleave(own, 0), logvar.repeat_interleave(own, 0))  # (n*own,4,h,w)
        latents = posterior.sample(generator).repeat_interleave(copies // own, 0)  # (n*copies,4,h,w)
        return latents.float() * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b,4,h,w) -> pictures (b,3,H,W) in [0,1], one at a time to save memory."""
        dtype = next(self.vae.parameters()).dtype
        scaled = (latents / self.config.vae.scale_factor).to(self.device, dtype)
        images = torch.cat([self.autoencoder.decode(latent) for latent in scaled.split(1)])
        return (check_finite("the VAE's decoder", images).float() * 0.5 + 0.5).clamp(0, 1)


def refuse_unusable(kind: str, request: Request) -> None:
    """InputError where a request has what this kind of model, "base" or "refiner", has no use for."""
    for name in UNUSABLE[kind]:
        if getattr(request, name) is not None:
            raise InputError(f"{name} is of no use to an SDXL {kind}: leave it out")


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
