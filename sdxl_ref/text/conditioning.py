"""Prompt, sizes and score -> the `Conditioning` that a UNet reads.

Source: `GeneralConditioner`, `ConcatTimestepEmbedderND` in sgm/modules/encoders/modules.py; Podell et al. 2023
(arXiv:2307.01952), sections 2.2 (sizes) and 2.5; the score is in the code alone. Sizes are (height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdxl_ref.diffusion.denoiser import Conditioning
from sdxl_ref.networks.layers import sinusoidal_embedding
from sdxl_ref.text.tokenizer import tokenize

NUMBER_DIM = 256  # each size, crop or score becomes this many numbers


@dataclass(frozen=True)
class Numbers:
    """What a UNet is told of a picture besides the prompt: the refiner reads the score, the base the target size."""

    original_size: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    target_size: tuple[int, int]
    aesthetic_score: float

    def tensor(self, kind: str) -> Tensor:
        """(5,) for a "refiner", (6,) for a "base", float32, in the order of the official embedders."""
        last = (self.aesthetic_score,) if kind == "refiner" else self.target_size
        return torch.tensor([*self.original_size, *self.crop, *last], dtype=torch.float32)


class PromptEmbeds(NamedTuple):
    """What the UNet reads of b prompts, on both sides; the names and the order are diffusers'.

    The negative side is None where there is no guidance.
    """

    prompt_embeds: Tensor  # (b,77,d), the context
    negative_prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor  # (b,e)
    negative_pooled_prompt_embeds: Tensor | None


def embed_numbers(numbers: Tensor) -> Tensor:
    """(b,k) -> (b,k*256), in float32: bfloat16 cannot hold every whole number above 256."""
    return sinusoidal_embedding(numbers.flatten(), NUMBER_DIM).reshape(len(numbers), -1)


def encode_text(
    clip_l: nn.Module | None,
    openclip: nn.Module,
    prompts: Sequence[str],
    prompts_2: Sequence[str],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """b prompts -> context (b,77,d) and pooled vector (b,e), on the device on which the encoders work.

    A base has CLIP-L, which reads `prompts`; OpenCLIP reads `prompts_2`; their contexts stand side by side. A refiner
    has OpenCLIP alone. The pooled vector is OpenCLIP's.
    """
    context, pooled = openclip(tokenize(prompts_2, pad="zero").to(device))
    if clip_l is not None:
        context = torch.cat([clip_l(tokenize(prompts, pad="eos").to(device)), context], dim=-1)
    return context, pooled


def conditioning_of(context: Tensor, pooled: Tensor, numbers: Tensor) -> Conditioning:
    """Text of b pictures (b,77,d) and (b,e), and their numbers (b,k); `y` is the pooled vector, then the numbers."""
    embedded = embed_numbers(numbers.to(pooled.device))  # (b,k*256)
    return Conditioning(context, torch.cat([pooled.float(), embedded], dim=1))
