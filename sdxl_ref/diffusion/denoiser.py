"""From a network that predicts noise, or v, to the one thing a sampler knows: `denoise(x, sigma)`.

Scaling and the map from sigma to training step live here and nowhere else.
Source: `Denoiser`, `EpsScaling` and `VScaling` in sgm/modules/diffusionmodules.
Shapes: b batch, h w latent height and width, d width of the context.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What a UNet reads besides x and t: `context` (b,77,d) in the UNet's dtype, `y` (b,adm) in float32.

    With guidance b counts both sides: the negative one first, then the positive one.
    """

    context: Tensor
    y: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a network predicts of x = x0 + sigma * noise, for sampling and for the loss alike.

    kind: "epsilon", the noise (Ho et al. 2020, arXiv:2006.11239), or "v", (noise - sigma x0) / sqrt(1 + sigma^2)
    (Salimans & Ho 2022, arXiv:2202.00512, appendix D). `timestep` is the training step of a level.
    """

    kind: str = "epsilon"
    timestep: Callable[[float], float] = NoiseSchedule().timestep

    @staticmethod
    def sigma(timesteps: Tensor) -> Tensor:
        """The levels of training steps (b,) int64."""
        return NoiseSchedule().sigmas[timesteps]

    @staticmethod
    def scale_in(x: Tensor, sigma: Tensor) -> Tensor:
        """x as the network reads it, with variance 1: sqrt(abar) x0 + sqrt(1 - abar) noise."""
        return x / torch.sqrt(sigma**2 + 1)

    def denoised(self, x: Tensor, output: Tensor | float, sigma: Tensor) -> Tensor:
        """The estimate of x0 that the network's output stands for."""
        if self.kind == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - sigma / torch.sqrt(sigma**2 + 1) * output

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network is trained to return."""
        if self.kind == "epsilon":
            return noise
        return (noise - sigma * x0) / torch.sqrt(1 + sigma**2)


@dataclass(frozen=True)
class Denoiser:
    """x (b,4,h,w) and sigma (0-d) -> the network's estimate of the clean latents, in the dtype of x."""

    network: Network
    prediction: Prediction
    conditioning: Conditioning

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        context = self.conditioning.context
        t = torch.full((len(x),), self.prediction.timestep(float(sigma)), dtype=torch.float32, device=x.device)
        scaled = self.prediction.scale_in(x, sigma).to(context.dtype)
        output = self.network(scaled, t, context, self.conditioning.y)
        return self.prediction.denoised(x, output.to(x.dtype), sigma)
