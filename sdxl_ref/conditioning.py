"""Prompt, sizes and score -> the `Conditioning` that a UNet reads.

Source: `GeneralConditioner`, `ConcatTimestepEmbedderND` in sgm/modules/encoders/modules.py; Podell et al. 2023
(arXiv:2307.01952), sections 2.2 and 2.5. Sizes are (height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxl_ref.diffusion.denoiser import Conditioning
from sdxl_ref.networks.layers import sinusoidal_embedding
from sdxl_ref.tokenizer import tokenize

NUMBER_DIM = 256  # each size, crop or score becomes this many numbers


@dataclass(frozen=True)
class Numbers:
    """What a UNet is told of a picture besides the prompt: the refiner reads the score, the base the target size."""

    original_size: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None

    def tensor(self) -> Tensor:
        """(5,) for the refiner, (6,) for the base, float32, in the order of the official embedders."""
        last = self.target_size if self.aesthetic_score is None else (self.aesthetic_score,)
        assert last is not None
        return torch.tensor([*self.original_size, *self.crop, *last], dtype=torch.float32)


def embed_numbers(numbers: Tensor) -> Tensor:
    """(b,k) -> (b,k*256), in float32: bfloat16 cannot hold every whole number above 256."""
    return sinusoidal_embedding(numbers.flatten(), NUMBER_DIM).reshape(len(numbers), -1)


def encode(text_encoder_2: nn.Module, prompts: Sequence[str], numbers: Numbers) -> Conditioning:
    """Conditioning of b prompts with the same numbers, on the encoder's device; `y` is pooled text, then numbers."""
    device = next(text_encoder_2.parameters()).device
    context, pooled = text_encoder_2(tokenize(prompts, pad="zero").to(device))  # (b,77,d), (b,e)
    embedded = embed_numbers(numbers.tensor().to(device)[None]).expand(len(prompts), -1)
    return Conditioning(context, torch.cat([pooled.float(), embedded], dim=1))
