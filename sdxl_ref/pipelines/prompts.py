"""What a run may read in place of plain prompts: other syntaxes, earlier hidden states, tokens, embeds handed in.

Loaded where one of these is asked for.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.conditioning import PromptEmbeds
from sdxl_ref.text.inversion import Inversions
from sdxl_ref.text.prompt_encoding import encode_prompts
from sdxl_ref.weights.inversion_files import load_inversion

Side = tuple[Tensor, Tensor]  # context (b,n,d) and pooled (b,e)


def text_encoding(pipe: Any, syntax: str, clip_skip: int | None) -> Callable[..., Side]:
    """What encodes texts, in the place of `encode_text`: see `prompt_encoding`."""
    return partial(encode_prompts, syntax=syntax, clip_skip=clip_skip, inversions=pipe.inversions)


def own_embeds(pipe: Any, r: Any, count: int) -> PromptEmbeds:
    """Embeds that a request hands in, for `count` pictures; a side of which it has none reads its prompt.

    InputError where half of a side is missing, or where the shapes are not the model's.
    """
    positive = side(pipe, r, count, "")
    if not r.guided:
        return PromptEmbeds(positive[0], None, positive[1], None)
    reads_nothing = r.negative_prompt_embeds is None and r.negative_prompt is None and r.negative_prompt_2 is None
    if pipe.zeros and reads_nothing:
        negative = torch.zeros_like(positive[0]), torch.zeros_like(positive[1])
    else:
        negative = side(pipe, r, count, "negative_")
    if positive[0].shape != negative[0].shape:
        shapes = f"{tuple(positive[0].shape)} and {tuple(negative[0].shape)}"
        raise InputError(f"expected both sides' embeds of one shape, found {shapes}: hand in those of both sides")
    return PromptEmbeds(positive[0], negative[0], positive[1], negative[1])


def side(pipe: Any, r: Any, count: int, prefix: str) -> Side:
    """Context (b,n,d) and pooled (b,e) of the positive side, or of the negative one, in the order of the pictures."""
    context, pooled = (getattr(r, f"{prefix}{name}prompt_embeds") for name in ("", "pooled_"))
    texts = getattr(r, f"{prefix}prompt"), getattr(r, f"{prefix}prompt_2")
    if context is None and pooled is None:
        first, second = ("" if texts[0] is None else texts[0]), texts[1]
        copies = count // (1 if isinstance(first, str) else len(first))
        options = {"prompt_syntax": r.prompt_syntax, "clip_skip": r.clip_skip}
        embeds = pipe.encode_prompt(
            first, second, num_images_per_prompt=copies, do_classifier_free_guidance=False, **options
        )
        return embeds.prompt_embeds, embeds.pooled_prompt_embeds
    if context is None or pooled is None:
        names = [f"{prefix}{name}prompt_embeds" for name in ("", "pooled_")]
        raise InputError(f"{names[0]} and {names[1]} belong together: hand in both, as encode_prompt returns them")
    if texts != (None, None):
        raise InputError(f"{prefix}prompt and {prefix}prompt_embeds both say what is read: give one of them")
    width = pipe.config.unet.context_dim
    pooled_width = pipe.config.text_encoders[-1].embed_dim
    return (
        checked(context, f"{prefix}prompt_embeds (b,77*k,{width})", 3, width, count, pipe.device),
        checked(pooled, f"{prefix}pooled_prompt_embeds (b,{pooled_width})", 2, pooled_width, count, pipe.device),
    )


def checked(embeds: Any, expected: str, ndim: int, width: int, count: int, device: torch.device) -> Tensor:
    """One of the tensors, for each of the pictures. InputError for another form, width or number."""
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise InputError(f"expected {expected} in floating point, found {type(embeds).__name__}")
    if embeds.ndim != ndim or embeds.shape[-1] != width or not len(embeds) or count % len(embeds):
        raise InputError(f"expected {expected} for one picture or each of {count}, found {tuple(embeds.shape)}")
    return embeds.to(device).repeat_interleave(count // len(embeds), 0)  # (b,…)


def load_textual_inversion(pipe: Any, path: str | Path, token: str | None = None) -> None:
    """Have a word of prompts stand for the vectors of a file (`clip_g`, `clip_l`, or one tensor).

    Without `token` it is the file's name, or its only key. See `sdxl_ref.weights.inversion_files`. On an ensemble, for
    each of its models that has a tower for them. InputError where the file fits none.
    """
    errors = []
    for model in pipe.models():
        inversions = model.inversions or Inversions(model.config.text_encoders)
        try:
            load_inversion(inversions, Path(path), token)
        except InputError as error:
            errors.append(error)
        else:
            model.inversions = inversions
    if len(errors) == len(pipe.models()):
        raise errors[0]


def unload_textual_inversion(pipe: Any, token: str | None = None) -> None:
    """Forget a token, or all of them. InputError where there is no such token."""
    models = [model for model in pipe.models() if model.inversions is not None]
    known = [model for model in models if token is None or token in model.inversions.tokens]
    if not known:
        raise InputError(f"no token {token!r} is loaded" if token else "no textual inversion is loaded")
    for model in known:
        model.inversions.unload(token)
        model.inversions = model.inversions if model.inversions.tokens else None
