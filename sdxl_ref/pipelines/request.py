"""The arguments of a run, with the ecosystem's names and defaults, each with its meaning beside it.

A pipeline's call and its help take names, defaults and meanings from here, and the command line most of its options.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor

from sdxl_ref.config import SDXL, Defaults, InputError, unknown
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.diffusion.steps import check_amounts
from sdxl_ref.noise import Generator

Self = TypeVar("Self", bound="Request")
Size = tuple[int, int]  # height, width
Prompt = str | Sequence[str]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SAMPLER_OPTIONS = ("eta", "s_noise", "s_churn", "s_tmin", "s_tmax")


def option(meaning: str, default: Any = MISSING) -> Any:
    """A field of a request with its meaning."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What every pipeline takes. Sizes are (height, width). Equal to itself alone, since it may hold tensors.

    A run starts from one of: `image`, a clean picture, noised to the first level that `strength` leaves; `image` with
    `denoising_start`, a noisy latent that stands at that level; `latents` with `strength` or `denoising_start`, the
    same; `latents` alone, unit noise, which is scaled to the first level; or none of them: noise is drawn.

    `image` is a PIL picture, a path or an address, or several; pictures as arrays (b,H,W,3) or tensors (b,3,H,W), in
    [0,1] or uint8; or latents (b,4,h,w), scaled by 0.13025. `guidance_scale` may be a list with a number for each step
    that runs, or a tensor (b,) with one for each picture.
    """

    prompt: Prompt | None = option("what the pictures show: one text, or one for each", None)
    prompt_2: Prompt | None = option("base only: for the second text encoder; None: the prompt", None)
    negative_prompt: Prompt | None = option("what to steer away from; None: '' on a refiner, zeros on a base", None)
    negative_prompt_2: Prompt | None = option("base only: for the second text encoder; None: negative_prompt", None)
    prompt_syntax: str = option('"plain", "a1111" or "comfy": whose weights and chunks, see `text`', "plain")
    clip_skip: int | None = option("read the hidden state of so many layers earlier, of both towers", None)
    prompt_embeds: Tensor | None = option("(b,77*k,d) in place of a prompt, as `encode_prompt` returns it", None)
    pooled_prompt_embeds: Tensor | None = option("(b,e), with prompt_embeds", None)
    negative_prompt_embeds: Tensor | None = option("(b,77*k,d) in place of a negative prompt", None)
    negative_pooled_prompt_embeds: Tensor | None = option("(b,e), with negative_prompt_embeds", None)
    image: Any = option("what to start from, in place of noise: see the request", None)
    strength: float | None = option("share of the steps that a picture runs, above 0 and at most 1; None: 0.3", None)
    strength_rule: str = option('"exact", or "sgm" as the official code counts', "exact")
    denoising_start: float | None = option("share of the training steps that another network has done", None)
    mask_image: Any = option("where a picture is painted: white; black stays; see `pipelines.masking`", None)
    denoising_end: float | None = option("share of the training steps after which this run stops", None)
    height: int | None = option("of noise: a multiple of 8; None: the training pictures' (SDXL: 1024)", None)
    width: int | None = option("of noise: a multiple of 8; None: the training pictures' (SDXL: 1024)", None)
    tile: bool = option("denoise in overlapping windows of 1024 pixels, for large pictures in little memory", False)
    num_inference_steps: int = option("steps of the whole schedule, 1 to 1000", 50)
    guidance_scale: Any = option("how far to go from the negative side; 1 or less: no guidance", 5.0)
    guidance_rescale: float = option("0 to 1: pull the spread back to the positive side's", 0.0)
    guidance_interval: Any = option("(low, high): guide between these sigmas alone, both included", None)
    generator: Generator | None = option("a torch.Generator, or one for each picture; None: seeded by the system", None)
    latents: Tensor | None = option("(b,4,h,w), what the run starts from: see the request", None)
    num_images_per_prompt: int = option("pictures for each prompt", 1)
    batch_invariant: bool = option("each picture by itself: the same bits whatever is in the batch", False)
    original_size: Size | None = option("the original size given to the UNet; None: the picture's own", None)
    crops_coords_top_left: Size = option("the top left corner of the crop, given to the UNet", (0, 0))
    negative_original_size: Size | None = option("the negative side's; None: original_size", None)
    negative_crops_coords_top_left: Size | None = option("the negative side's; None: see `Pipeline.sizes`", None)
    target_size: Size | None = option("base only: the bucket's size; None: the picture's own", None)
    negative_target_size: Size | None = option("base only: the negative side's; None: target_size", None)
    aesthetic_score: float | None = option("refiner only: of the picture wanted, about 1 to 10; None: 6.0", None)
    negative_aesthetic_score: float | None = option("refiner only: of the picture to avoid; None: 2.5", None)
    sampler: str | None = option("the name of a sampler, a key of SAMPLERS; None: the model's own, or euler", None)
    spacing: Any = option("leading, trailing, linspace or sgm; None: the model's own, or leading", None)
    karras: bool | None = option("Karras' sigmas between the spacing's ends; None: the model's own, or not", None)
    sigmas: Any = option("own noise levels in place of a spacing's, falling; at the last one the run ends", None)
    timesteps: Any = option("own training steps in place of a spacing's, falling; the run ends at sigma 0", None)
    eta: float | None = option("share of fresh noise of a sampler that draws it; None: the sampler's own", None)
    s_noise: float | None = option("factor on a sampler's fresh noise; None: 1", None)
    s_churn: float | None = option("Karras' churn, of euler and heun; None: 0", None)
    s_tmin: float | None = option("churn from this sigma upwards; None: 0", None)
    s_tmax: float | None = option("churn up to this sigma; None: no limit", None)
    output_type: str = option('"pil", "np" (b,H,W,3), "pt" (b,3,H,W), or "latent" (b,4,h,w)', "pil")

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            from sdxl_ref.diffusion.sampler_names import answer  # other tools' names

            raise InputError(answer(self.sampler))
        if self.output_type not in OUTPUT_TYPES:
            raise InputError(unknown("output_type", self.output_type, OUTPUT_TYPES))
        if self.schedules_guidance:
            guidance_schedule().check(self.guidance_scale, self.guidance_interval)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise InputError(f"{name} must be a finite number, found {getattr(self, name)}")
        is_unlimited = self.s_tmax == math.inf
        check_amounts(**(self.sampler_options() | ({"s_tmax": 0.0} if is_unlimited else {})))
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            check_texts(name, getattr(self, name), self.prompt_embeds is None)
        for field_ in fields(self):
            if field_.type in (Size, Size | None):
                check_pair(field_.name, getattr(self, field_.name))
            if field_.type in (int, int | None) and type(getattr(self, field_.name)) not in (int, NoneType):
                raise InputError(f"{field_.name} must be a whole number, found {getattr(self, field_.name)!r:.60}")
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale must be from 0 to 1, found {self.guidance_rescale}")
        if self.num_images_per_prompt < 1 or self.prompts * self.num_images_per_prompt > 1000:
            images = f"num_images_per_prompt {self.num_images_per_prompt} for {self.prompts} prompts"
            raise InputError(f"{images}: expected 1 to 1000 pictures in all")
        if self.sampler is not None:
            self.check_options(self.sampler)

    def check_options(self, sampler: str) -> None:
        """InputError for an option of samplers that this one has no use for."""
        usable = inspect.signature(SAMPLERS[sampler]).parameters
        for name in self.sampler_options():
            if name not in usable:
                raise InputError(f"{name} is of no use to the sampler {sampler}: leave it out")
            if "s_churn" in usable and not self.s_churn and name != "s_churn":
                raise InputError(f"{name} is of no use without s_churn: give that too, or leave it out")

    def completed(self: Self, defaults: Defaults) -> Self:
        """With a model's own way of running where this says nothing. InputError where that cannot be had here."""
        if defaults != SDXL or self.has_own_levels:
            return own_settings().completed(self, defaults)
        spacing = SDXL.spacing if self.spacing is None else self.spacing
        return replace(self, sampler=self.sampler or SDXL.sampler, spacing=spacing, karras=bool(self.karras))

    def left_open(self, defaults: Defaults) -> str:
        """What the model's own settings decide, where they are not SDXL's, or own levels, as a plan tells it."""
        return "" if defaults == SDXL and not self.has_own_levels else own_settings().left_open(self, defaults)

    @property
    def has_own_levels(self) -> bool:
        return self.sigmas is not None or self.timesteps is not None

    def sampler_options(self) -> dict[str, float]:
        """The options of the sampler that are not its own defaults."""
        options = {name: getattr(self, name) for name in SAMPLER_OPTIONS}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def is_noisy(self) -> bool:
        """Whether what it starts from stands at the first level already."""
        return self.denoising_start is not None or (self.latents is not None and self.strength is not None)

    @property
    def guided(self) -> bool:
        """Whether the negative side runs."""
        if self.schedules_guidance:
            return guidance_schedule().is_guided(self.guidance_scale)
        return self.guidance_scale > 1

    @property
    def schedules_guidance(self) -> bool:
        """Whether guidance is anything but one number everywhere."""
        is_number = isinstance(self.guidance_scale, int | float) and math.isfinite(self.guidance_scale)
        return self.guidance_interval is not None or not is_number

    @property
    def prompts(self) -> int:
        """How many prompts there are, or embeds of such."""
        prompts = self.prompt_embeds if self.prompt is None else self.prompt
        return 1 if prompts is None or isinstance(prompts, str) else len(prompts)


def own_settings() -> Any:
    """The module of runs that go another way than SDXL's own, imported for one."""
    from sdxl_ref.pipelines import own_settings

    return own_settings


def guidance_schedule() -> Any:
    """The module of guidance that is not the same everywhere, imported where it is asked for."""
    from sdxl_ref.diffusion import guidance_schedule

    return guidance_schedule


def check_texts(name: str, texts: Any, wants_prompt: bool) -> None:
    """InputError unless this is a text, or some, or None where there may be none."""
    if isinstance(texts, str) or (texts is None and not (wants_prompt and name == "prompt")):
        return
    is_many = isinstance(texts, Sequence) and not isinstance(texts, bytes)
    if not is_many or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text, or one for each picture, found {texts!r:.60}")


def check_pair(name: str, pair: Any) -> None:
    """InputError unless this is (height, width) or (top, left) in pixels, or None."""
    is_pair = isinstance(pair, Sequence) and len(pair) == 2 and all(type(side) is int and side >= 0 for side in pair)
    if pair is not None and not is_pair:
        raise InputError(f"{name} must be two whole numbers of at least 0, found {pair!r:.60}")
