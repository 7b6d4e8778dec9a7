"""Painting in a part of a picture: outside a mask every clean estimate is the picture's own.

What a solver makes of such estimates is the picture with its own noise, at every level and of whatever order it is, so
that what is painted fits what stays. With Euler's method it is what Lugmayr et al. 2022 (arXiv:2201.09865, equation 8)
and diffusers' `StableDiffusionXLInpaintPipeline` with a network of 4 channels paste in between the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.diffusion.steps import Denoise


@dataclass(frozen=True)
class Mask:
    """Where b pictures are painted. A weight of 1 is painted, 0 stays, what is between blends the estimates."""

    weight: Tensor  # (b,1,h,w) in [0,1], of latent cells
    clean: Tensor  # (b,4,h,w), the pictures' latents
    paste: Callable[[Tensor], Tensor]  # pictures (b,3,H,W) -> the same with the pixels that stay

    def around(self, denoise: Denoise) -> Denoise:
        """`denoise(x, sigma)` whose estimate is the picture's own outside."""

        def masked(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.lerp(self.clean, denoise(x, sigma), self.weight)

        return masked

    def kept(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x after the last step, whose cells outside are exactly the picture's, unless the run ends above sigma 0."""
        return x if sigma > 0 else torch.where(self.weight > 0, x, self.clean)
