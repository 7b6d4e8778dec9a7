"""The mistakes between the networks: tokens, sizes, schedule, scales, guidance, each as another value for one of ours.

`BETWEEN` is the table, by point. One more is one more function with `@between("point", "what it is")`: of our value
and of what is known of the run, it returns what the value would be with the mistake, or None.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.networks.layers import sinusoidal_embedding
from sdxl_ref.parity.diagnosis import CLEARLY, in_words
from sdxl_ref.parity.replay import Check, Replay, difference
from sdxl_ref.parity.trace import Key, matches
from sdxl_ref.text.conditioning import embed_numbers
from sdxl_ref.text.tokenizer import tokenize


@dataclass(frozen=True)
class Known:
    """A run: the pipeline, its request, and the values between the networks: ours, made of theirs, and theirs."""

    pipe: Any
    request: Any
    replay: Replay

    def theirs(self, point: str, call: int = 0) -> Tensor | None:
        return self.replay.theirs.tensor(Key(point, call))

    def ours(self, point: str, call: int = 0) -> Tensor | None:
        return self.replay.ours.get(Key(point, call))

    @property
    def grid(self) -> Any:
        return self.pipe.plan(self.request).grid


Other = Callable[[Tensor, Known, int], "Tensor | None"]


class Between(NamedTuple):
    point: str
    text: str
    value: Other


BETWEEN: list[Between] = []


def between(point: str, text: str) -> Callable[[Other], Other]:
    def listed(value: Other) -> Other:
        BETWEEN.append(Between(point, text, value))
        return value

    return listed


def simple(point: str, **values: Callable[[Tensor], Tensor]) -> None:
    """Mistakes that need our value alone; `_` stands for a blank in their names."""
    for text, value in values.items():
        between(point, text.replace("_", " "))(lambda ours, known, call, value=value: value(ours))  # type: ignore[misc]


def explain(replay: Replay, pipe: Any, request: Any, culprits: list[str]) -> dict[str, str]:
    """For each culprit between the networks the mistake that explains it best; the others are left out."""
    known = Known(pipe, request, replay)
    causes = {}
    for culprit in culprits:
        for check in checks_of(replay, culprit):
            text = explanation(check, known, culprit)
            if text is not None:
                causes[culprit] = text
                break
    return causes


def checks_of(replay: Replay, culprit: str) -> Iterator[Check]:
    """Those that are furthest off first."""
    own = [check for check in replay.checks if check.point == culprit and check.key in replay.between]
    return iter(sorted(own, key=lambda check: -check.own.relative_l2)[:3])


def explanation(check: Check, known: Known, culprit: str) -> str | None:
    ours, theirs = known.replay.between[check.key]
    before = check.own.relative_l2
    best: tuple[float, str] | None = None
    for mistake in BETWEEN:
        if not matches(culprit, mistake.point):
            continue
        try:
            other = mistake.value(ours, known, check.key.call)
        except (RuntimeError, IndexError):
            continue
        if other is None or other.shape != theirs.shape:
            continue
        after = difference(theirs, other, torch.float32).relative_l2
        if after * CLEARLY <= before and (best is None or after < best[0]):
            best = after, mistake.text
    return None if best is None else in_words(best[1], before, best[0])


# --- the prompt ---------------------------------------------------------------------------------------------------


def sides(known: Known) -> list[str]:
    """The prompts in the order in which a tower reads them: the positive side first."""
    r = known.request
    prompts = [r.prompt] if isinstance(r.prompt, str) else list(r.prompt)
    return prompts + [r.negative_prompt or ""] * (len(prompts) if r.guided else 0)


@between("tokens/*", "padding with the end-of-text token")
def _padded_with_end(ours: Tensor, known: Known, call: int) -> Tensor:
    return tokenize(sides(known)[: len(ours)], pad="eos")


@between("tokens/*", "padding with 0")
def _padded_with_zero(ours: Tensor, known: Known, call: int) -> Tensor:
    return tokenize(sides(known)[: len(ours)], pad="zero")


simple(
    "tokens/*",
    the_two_sides_exchanged=lambda t: t.roll(len(t) // 2, 0),
    no_start_token=lambda t: torch.cat([t[:, 1:], t[:, -1:]], 1),
)
simple("conditioning/context", the_two_sides_exchanged=lambda t: t.roll(len(t) // 2, 0))


@between("conditioning/context", "zeros on the negative side, where it is the empty prompt")
def _zero_context(ours: Tensor, known: Known, call: int) -> Tensor:
    other = ours.clone()
    other[: len(other) // 2] = 0
    return other


@between("conditioning/y", "zeros on the negative side, where it is the empty prompt")
@between("conditioning/pooled", "zeros on the negative side, where it is the empty prompt")
def _zero_pooled(ours: Tensor, known: Known, call: int) -> Tensor:
    other = ours.clone()
    other[: len(other) // 2, : known.pipe.config.text_encoders[-1].embed_dim] = 0
    return other


# --- sizes, crops, score ------------------------------------------------------------------------------------------

ORDERS = {
    "height and width exchanged": lambda n: n[:, [1, 0, 3, 2, *([5, 4] if n.shape[1] == 6 else [4])]],
    "height and width of the original size exchanged": lambda n: n[:, [1, 0, *range(2, n.shape[1])]],
    "top and left of the crop exchanged": lambda n: n[:, [0, 1, 3, 2, *range(4, n.shape[1])]],
    "crop and target size exchanged": lambda n: n[:, [0, 1, 4, 5, 2, 3]] if n.shape[1] == 6 else n,
    "the two sides exchanged": lambda n: n.roll(len(n) // 2, 0),
    "the positive side's numbers on both sides": lambda n: n[len(n) // 2 :].repeat(2, 1),
    "the negative side's score on both sides": lambda n: torch.cat([n[:, :-1], n[:1, -1:].expand(len(n), 1)], 1),
    "no numbers: zeros": torch.zeros_like,
}
for _text, _order in ORDERS.items():
    between("conditioning/numbers", _text)(lambda ours, known, call, order=_order: order(ours))  # type: ignore[misc]

    @between("conditioning/y", _text)
    def _y_of(ours: Tensor, known: Known, call: int, order: Any = _order) -> Tensor | None:
        return y_with(ours, known, lambda numbers: embed_numbers(order(numbers)))


def y_with(ours: Tensor, known: Known, embed: Callable[[Tensor], Tensor]) -> Tensor | None:
    numbers = known.ours("conditioning/numbers")
    if numbers is None:
        return None
    return torch.cat([ours[:, : ours.shape[1] - 256 * numbers.shape[1]], embed(numbers).to(ours)], dim=1)


def flipped(numbers: Tensor) -> Tensor:
    """Sines first, then cosines."""
    return sinusoidal_embedding(numbers.flatten(), 256).roll(128, -1).reshape(len(numbers), -1)


EMBEDDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes in bfloat16": lambda n: embed_numbers(n.bfloat16()),
    "sizes in float16": lambda n: embed_numbers(n.half()),
    "sines before cosines": flipped,
    "sizes embedded in bfloat16": lambda n: embed_numbers(n).bfloat16(),
    "sizes embedded in float16": lambda n: embed_numbers(n).half(),
}
for _text, _embed in EMBEDDINGS.items():

    @between("conditioning/y", _text)
    def _y_embedded(ours: Tensor, known: Known, call: int, embed: Any = _embed) -> Tensor | None:
        return y_with(ours, known, embed)


@between("conditioning/y", "the numbers first, then the pooled vector")
def _numbers_first(ours: Tensor, known: Known, call: int) -> Tensor:
    numbers = known.ours("conditioning/numbers")
    width = ours.shape[1] - 256 * (5 if numbers is None else numbers.shape[1])
    return torch.cat([ours[:, width:], ours[:, :width]], 1)


simple("conditioning/y", the_two_sides_exchanged=lambda t: t.roll(len(t) // 2, 0))


# --- schedule -----------------------------------------------------------------------------------------------------


def grid_with(known: Known, spacing: str, karras: bool) -> Any:
    r = replace(known.request, spacing=spacing, karras=karras)
    return known.pipe.plan(r).grid


for _spacing in ("leading", "trailing", "linspace", "sgm"):
    for _karras in (False, True):
        _text = f'spacing "{_spacing}"' + " with Karras sigmas" * _karras

        @between("schedule/sigmas", _text)
        def _sigmas(ours: Tensor, known: Known, call: int, s: str = _spacing, k: bool = _karras) -> Tensor:
            return grid_with(known, s, k).sigmas

        @between("schedule/timesteps", _text)
        def _timesteps(ours: Tensor, known: Known, call: int, s: str = _spacing, k: bool = _karras) -> Tensor:
            return torch.tensor(grid_with(known, s, k).timesteps, dtype=torch.float64)


@between("schedule/sigmas", "steps_offset 0, where it is 1")
def _no_offset(ours: Tensor, known: Known, call: int) -> Tensor:
    steps = [max(0, round(t) - 1) for t in known.grid.timesteps]
    return torch.cat([NoiseSchedule().sigmas[steps], torch.zeros(1)]).to(ours)


simple("schedule/timesteps", steps_offset_0_where_it_is_1=lambda t: t - 1, one_too_high=lambda t: t + 1)
simple("denoiser/timestep", steps_offset_0_where_it_is_1=lambda t: t - 1, one_too_high=lambda t: t + 1)


@between("denoiser/timestep", "sigma, where it is the training step")
def _sigma_for_t(ours: Tensor, known: Known, call: int) -> Tensor | None:
    sigma = known.ours("denoiser/sigma", call)
    return None if sigma is None else torch.full_like(ours, float(sigma))


@between("denoiser/timestep", "the index of the step, where it is the training step")
def _index_for_t(ours: Tensor, known: Known, call: int) -> Tensor:
    return torch.full_like(ours, call)


# --- latents ------------------------------------------------------------------------------------------------------


def scaled(point: str, text: str, factor: Callable[[float], float]) -> None:
    @between(point, text)
    def other(ours: Tensor, known: Known, call: int) -> Tensor:
        return ours * factor(known.pipe.config.vae.scale_factor)


scaled("latents/picture", "the scale 0.13025 missing", lambda s: 1 / s)
scaled("latents/picture", "divided by 0.13025, not multiplied", lambda s: s**-2)
scaled("latents/picture", "scaled twice", lambda s: s)
scaled("latents/picture", "SD 1's scale 0.18215", lambda s: 0.18215 / s)
scaled("latents/decoder_input", "not divided by the scale 0.13025", lambda s: s)
scaled("latents/decoder_input", "multiplied by 0.13025, not divided", lambda s: s**2)
scaled("latents/decoder_input", "divided twice", lambda s: 1 / s)
scaled("latents/decoder_input", "SD 1's scale 0.18215", lambda s: s / 0.18215)


@between("latents/picture", "the mode of the posterior, not a sample")
def _mode(ours: Tensor, known: Known, call: int) -> Tensor | None:
    mean = known.theirs("posterior/mean")
    return None if mean is None else mean.to(ours) * known.pipe.config.vae.scale_factor


def first_x(known: Known, of_noise: Callable[[Tensor, Tensor], Tensor], of_clean: float = 1.0) -> Tensor | None:
    """x at the first level with another share of noise; of a base from noise alone."""
    sigma = known.grid.sigmas[0]
    clean = known.ours("latents/picture")
    noise = known.ours("noise", 0 if clean is None else 1)
    if noise is None:
        return None
    return of_noise(noise, sigma) + (0 if clean is None else of_clean * clean)


STARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the first noise without its scale": lambda noise, sigma: noise,
    "no first noise": lambda noise, sigma: torch.zeros_like(noise),
    "the noise scaled twice": lambda noise, sigma: noise * sigma**2,
    "the noise scaled by sqrt(sigma^2 + 1)": lambda noise, sigma: noise * torch.sqrt(sigma**2 + 1),
    "the noise scaled by sigma": lambda noise, sigma: noise * sigma,
}
for _text, _noise in STARTS.items():

    @between("denoiser/x", _text)
    def _start(ours: Tensor, known: Known, call: int, of_noise: Any = _noise) -> Tensor | None:
        return first_x(known, of_noise) if call == 0 else None


@between("denoiser/input", "x not divided by sqrt(sigma^2 + 1)")
def _unscaled(ours: Tensor, known: Known, call: int) -> Tensor | None:
    sigma = known.ours("denoiser/sigma", call)
    return None if sigma is None else ours * torch.sqrt(sigma.to(ours) ** 2 + 1)


@between("denoiser/input", "x divided twice by sqrt(sigma^2 + 1)")
def _scaled_twice(ours: Tensor, known: Known, call: int) -> Tensor | None:
    sigma = known.ours("denoiser/sigma", call)
    return None if sigma is None else ours / torch.sqrt(sigma.to(ours) ** 2 + 1)


# --- guidance and steps -------------------------------------------------------------------------------------------


def guided_with(known: Known, call: int, guide: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor | None:
    """The clean estimate with another guidance of their two sides."""
    eps, x, sigma = known.theirs("unet", call), known.ours("denoiser/x", call), known.ours("denoiser/sigma", call)
    if eps is None or x is None or sigma is None or len(eps) != 2 * len(x):
        return None
    negative, positive = eps.to(x).chunk(2)
    return x - sigma.to(x) * guide(negative, positive, float(known.request.guidance_scale))


GUIDANCE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "the two sides exchanged": lambda n, p, s: p + s * (n - p),
    "no guidance: the positive side alone": lambda n, p, s: p,
    "the negative side alone": lambda n, p, s: n,
    "guidance from the positive side: p + s (p - n)": lambda n, p, s: p + s * (p - n),
    "a guidance scale one too low": lambda n, p, s: n + (s - 1) * (p - n),
    "guidance without the negative side: s p": lambda n, p, s: s * p,
}
for _text, _guide in GUIDANCE.items():

    @between("denoiser/denoised", _text)
    def _guided(ours: Tensor, known: Known, call: int, guide: Any = _guide) -> Tensor | None:
        return guided_with(known, call, guide)


# --- the picture --------------------------------------------------------------------------------------------------

simple("picture", left_in_minus_1_to_1=lambda p: p * 2 - 1, red_and_blue_exchanged=lambda p: p.flip(1))
simple("picture/input", red_and_blue_exchanged=lambda p: p.flip(1), from_0_to_1=lambda p: p / 2 + 0.5)
