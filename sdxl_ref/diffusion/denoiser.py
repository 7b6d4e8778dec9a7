"""From a network that predicts noise to the one thing a sampler knows: `denoise(x, sigma)`.

Scaling and the map from sigma to training step live here and nowhere else.
Source: `Denoiser`, `EpsScaling` and `VanillaCFG` in sgm/modules/diffusionmodules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.diffusion.schedule import Grid

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told besides x and t: `context` (b,77,d) in the UNet's dtype, `y` (b,adm) in float32."""

    context: Tensor
    y: Tensor


@dataclass(frozen=True)
class Denoiser:
    """x (b,4,h,w) and sigma (0-d) -> the estimate of the clean latents, in the dtype of x.

    With `negative`, both sides run as one batch and guidance extrapolates between them (Ho & Salimans 2022,
    arXiv:2207.12598); `guidance_rescale` in [0, 1] pulls the result's spread back to the positive side's (Lin et al.
    2023, arXiv:2305.08891, equations 15 and 16).
    """

    network: Network
    grid: Grid
    positive: Conditioning
    negative: Conditioning | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * self.eps(x, sigma)

    def eps(self, x: Tensor, sigma: Tensor) -> Tensor:
        sides = [self.positive] if self.negative is None else [self.negative, self.positive]
        context = torch.cat([side.context for side in sides])  # (k*b,77,d)
        y = torch.cat([side.y for side in sides])
        scaled = (x / torch.sqrt(sigma**2 + 1)).to(context.dtype)
        t = torch.full((len(context),), self.grid.timestep(float(sigma)), dtype=torch.float32, device=x.device)
        eps = self.network(torch.cat([scaled] * len(sides)), t, context, y).to(x.dtype)
        if self.negative is None:
            return eps
        negative, positive = eps.chunk(2)
        guided = negative + self.guidance_scale * (positive - negative)
        return rescale(guided, positive, self.guidance_rescale) if self.guidance_rescale else guided


def rescale(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Mix `guided` with itself at the standard deviation, per image, of `positive`."""
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return amount * guided * spread + (1 - amount) * guided
