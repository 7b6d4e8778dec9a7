"""Classifier-free guidance, as a function around `denoise(x, sigma)`.

Source: Ho & Salimans 2022 (arXiv:2207.12598); `VanillaCFG` in sgm/modules/diffusionmodules/guiders.py; Lin et al. 2023
(arXiv:2305.08891), section 3.4, on the rescaling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Guidance:
    """x (b,4,h,w) and sigma -> the positive side's estimate, pushed away from the negative side's.

    Both sides run as one batch: the denoiser's conditioning holds the negative side, then the positive one.
    `rescale` in [0, 1] pulls the spread of what the network predicts back to the positive side's.
    """

    denoise: Denoiser
    scale: float | Tensor  # (b,1,1,1): one for each picture
    rescale: float = 0.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        both = self.denoise(torch.cat([x, x]), sigma)  # (2b,4,h,w)
        negative, positive = both.chunk(2)
        guided = negative + self.scale * (positive - negative)
        if self.rescale == 0:
            return guided
        zero = self.denoise.prediction.denoised(x, 0.0, sigma)  # the estimate of an output of 0
        return zero + rescaled(guided - zero, positive - zero, self.rescale)


def rescaled(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Mix `guided` (b,4,h,w) with itself at the standard deviation, per image, of `positive`: equations 15 and 16."""
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return amount * guided * spread + (1 - amount) * guided
