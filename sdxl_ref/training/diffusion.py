"""What a diffusion UNet is trained on: noised latents at a random step, and the noise to be told.

Source: Ho et al. 2020 (arXiv:2006.11239), equation 14; Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.5
(sizes, crops and the refiner's range of steps); Ho & Salimans 2022 (arXiv:2207.12598) on dropped captions.
Shapes: b batch, h w latent height and width, k numbers (5 on a refiner, 6 on a base).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdxl_ref.conditioning import embed_numbers, encode_text
from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.networks.unet import UNet

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {  # of the error at noise level sigma; SNR = 1 / sigma^2
    "uniform": torch.ones_like,
    "min-snr": lambda sigma: (5 * sigma**2).clamp(max=1),  # min(SNR, 5) / SNR; Hang et al. 2023 (arXiv:2303.09556)
    "debiased": lambda sigma: sigma,  # 1 / sqrt(SNR); Yu et al. 2023 (arXiv:2310.08442)
    "v": lambda sigma: 1 + sigma**2,  # what the error of v weighs; Salimans & Ho 2022 (arXiv:2202.00512), section 4
}


@dataclass(frozen=True)
class Batch:
    """Clean latents (b,4,h,w), scaled; a caption each; the numbers (b,k) that the UNet is told, in float32."""

    latents: Tensor
    captions: list[str]
    numbers: Tensor


class Drawn(NamedTuple):
    """What chance decides of b pictures."""

    t: Tensor  # (b,) training steps
    noise: Tensor  # (b,4,h,w)
    dropped: Tensor  # (b,) bool: the caption is


@dataclass(frozen=True)
class Objective:
    """The noise prediction loss over steps `first` to `last` (both included): a refiner's are 0 to 199.

    `drop` is the share of captions that are dropped, so that guidance has its other side: zeros in place of the
    text's outputs on a base (two text encoders), the empty prompt on a refiner. `weighting` is a key of WEIGHTINGS.
    """

    first: int = 0
    last: int = 999
    drop: float = 0.1
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 999:
            raise InputError(
                f"steps must lie in 0 to 999, the first not above the last, found {self.first} to {self.last}"
            )
        if not 0 <= self.drop <= 1:
            raise InputError(f"drop is a share from 0 to 1, found {self.drop}")
        if self.weighting not in WEIGHTINGS:
            raise InputError(f"weighting is one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}")

    def loss(self, parts: nn.ModuleDict, batch: Batch, generator: torch.Generator) -> Tensor:
        """The loss of a batch (0-d), its captions encoded on the way."""
        drawn = self.draw(batch.latents.shape, generator)
        context, y = conditioning(parts, batch, drawn.dropped)
        return self.weighted(parts["unet"], batch.latents, drawn, context, y)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Drawn:
        """For latents of a shape (b,4,h,w): t, the noise and what is dropped, in this order, on the CPU."""
        t = torch.randint(self.first, self.last + 1, (shape[0],), generator=generator)
        noise = torch.randn(tuple(shape), generator=generator)
        return Drawn(t, noise, torch.rand(shape[0], generator=generator) < self.drop)

    def weighted(self, unet: nn.Module, latents: Tensor, drawn: Drawn, context: Tensor, y: Tensor) -> Tensor:
        """Weighted mean squared error of the predicted noise (0-d)."""
        errors = epsilon_errors(unet, latents, drawn.t, drawn.noise.to(latents.device), context, y)
        return (WEIGHTINGS[self.weighting](NoiseSchedule().sigmas[drawn.t]).to(errors) * errors).mean()


def epsilon_errors(unet: nn.Module, latents: Tensor, t: Tensor, noise: Tensor, context: Tensor, y: Tensor) -> Tensor:
    """At training steps t (b,): noise the latents, predict the noise; each one's mean squared error, float32 (b,).

    `context` is in the UNet's dtype; latents and noise may be more exact.
    """
    eps = unet(noised(latents, t, noise).to(context.dtype), t.to(latents.device), context, y)
    return F.mse_loss(eps.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))


def noised(latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """(x0 + sigma * noise) / sqrt(1 + sigma^2), which is sqrt(abar) x0 + sqrt(1 - abar) noise: what a UNet reads."""
    sigma = NoiseSchedule().sigmas[t].to(latents)[:, None, None, None]
    return (latents + sigma * noise) / torch.sqrt(1 + sigma**2)


def conditioning(parts: nn.ModuleDict, batch: Batch, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Context (b,77,d) and y (b,adm)."""
    context, pooled = text(parts, batch.captions, dropped)
    return context, torch.cat([pooled.float(), embed_numbers(batch.numbers.to(pooled.device))], dim=1)


def text(parts: nn.ModuleDict, captions: Sequence[str], dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Context (b,77,d) and pooled vectors (b,e) of captions, of which `dropped` (b,) bool are: zeros on a base, the
    empty prompt's on a refiner. Each different caption is encoded once."""
    base = "text_encoder" in parts
    told = ["" if gone and not base else caption for caption, gone in zip(captions, dropped.tolist(), strict=True)]
    different = list(dict.fromkeys(told))
    towers = parts["text_encoder"] if base else None, parts["text_encoder_2"]
    context, pooled = encode_text(*towers, different, different)
    index = torch.tensor([different.index(caption) for caption in told], device=context.device)
    kept = ~dropped.to(context.device) if base else torch.ones_like(index)
    return context[index] * kept[:, None, None], pooled[index] * kept[:, None]


def checkpoint_activations(unet: UNet) -> None:
    """Keep only what goes into each stage, and compute the rest again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174): less memory for about a third more time, the same gradients."""
    for stage in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)
