"""The loss of a diffusion UNet: latents are noised to a random level, and the network predicts noise, or v.

Source: Ho et al. 2020 (arXiv:2006.11239), equation 14; Salimans & Ho 2022 (arXiv:2202.00512), section 4 and appendix D
(v); Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.5 (sizes, crops and the refiner's range of timesteps);
Ho & Salimans 2022 (arXiv:2207.12598) on dropped captions.
Shapes: b batch, h w latent height and width, d width of the context, k numbers (5 on a refiner, 6 on a base).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdxl_ref.config import PREDICTIONS, InputError, unknown
from sdxl_ref.diffusion.denoiser import Conditioning, Prediction
from sdxl_ref.diffusion.schedule import TRAIN_STEPS
from sdxl_ref.networks.unet import UNet
from sdxl_ref.text.conditioning import conditioning_of, encode_text

# The weight of the noise's squared error at level sigma; the signal-to-noise ratio (SNR) is 1 / sigma^2.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "min-snr": lambda sigma: (5 * sigma**2).clamp(max=1),  # min(SNR, 5) / SNR; Hang et al. 2023 (arXiv:2303.09556)
    "debiased": lambda sigma: sigma,  # 1 / sqrt(SNR); Yu et al. 2023 (arXiv:2310.08442)
    "v": lambda sigma: 1 + sigma**2,  # what the error of v weighs: (SNR + 1) / SNR
}

EPSILON = Prediction("epsilon")


@dataclass(frozen=True)
class Batch:
    """Clean latents (b,4,h,w), scaled; a caption for each; the numbers (b,k) that the UNet reads, in float32."""

    latents: Tensor
    captions: list[str]
    numbers: Tensor


class Corruption(NamedTuple):
    """What is drawn for b pictures: how far each is noised, with which noise, and whose caption is dropped."""

    timesteps: Tensor  # (b,) int64, on the CPU
    noise: Tensor  # (b,4,h,w)
    dropped: Tensor  # (b,) bool

    def select(self, pictures: slice) -> "Corruption":
        """That of some of the pictures."""
        return Corruption(self.timesteps[pictures], self.noise[pictures], self.dropped[pictures])


@dataclass(frozen=True)
class Objective:
    """The loss of a network over the timesteps `first` to `last`, both included: a refiner's are 0 to 199.

    `drop` is the share of captions that are dropped, for classifier-free guidance: zeros in place of the text's
    outputs on a base (two text encoders), the empty prompt on a refiner. `weighting` is a key of WEIGHTINGS.
    `prediction` is what the network returns: "epsilon" or "v".
    """

    first: int = 0
    last: int = 999
    drop: float = 0.1
    weighting: str = "uniform"
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        highest = TRAIN_STEPS - 1
        if not 0 <= self.first <= self.last <= highest:
            limits = f"in 0 to {highest}, the first not above the last"
            raise InputError(f"steps must lie {limits}, found {self.first} to {self.last}")
        if not 0 <= self.drop <= 1:
            raise InputError(f"drop is a share from 0 to 1, found {self.drop}")
        if self.weighting not in WEIGHTINGS:
            raise InputError(f"weighting is one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}")
        if self.prediction not in PREDICTIONS:
            raise InputError(unknown("prediction", self.prediction, PREDICTIONS))

    @property
    def identity(self) -> dict[str, Any]:
        """What the state of a run keeps of it; the usual prediction is left out, as older states have it."""
        settings = asdict(self)
        if self.prediction == "epsilon":
            del settings["prediction"]
        return settings

    def loss(self, parts: nn.ModuleDict, batch: Batch, generator: torch.Generator) -> Tensor:
        """The loss of a batch (0-d), its captions encoded on the way."""
        corruption = self.draw(batch.latents.shape, generator)
        conditioning = encode_conditioning(parts, batch, corruption.dropped)
        return self.weighted_loss(parts["unet"], batch.latents, corruption, conditioning)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Corruption:
        """For latents of a shape (b,4,h,w): the timesteps, the noise and what is dropped, in this order, on the CPU."""
        count = shape[0]
        timesteps = torch.randint(self.first, self.last + 1, (count,), generator=generator)
        noise = torch.randn(tuple(shape), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.drop
        return Corruption(timesteps, noise, dropped)

    def weighted_loss(
        self, unet: nn.Module, latents: Tensor, corruption: Corruption, conditioning: Conditioning
    ) -> Tensor:
        """The weighted mean of the pictures' squared errors (0-d)."""
        timesteps = corruption.timesteps
        noise = corruption.noise.to(latents.device)
        errors = squared_errors(unet, latents, timesteps, noise, conditioning, Prediction(self.prediction))
        return (self.weight(Prediction.sigma(timesteps)).to(errors) * errors).mean()

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight of the squared error of what the network predicts, at each level (b,).

        WEIGHTINGS are of the noise's error, whatever is predicted; but "uniform" is 1 for every network.
        """
        if self.weighting == "uniform":
            return torch.ones_like(sigma)
        return WEIGHTINGS[self.weighting](sigma) / error_ratio(self.prediction, sigma)


def error_ratio(prediction: str, sigma: Tensor) -> Tensor:
    """The squared error of what a network predicts, divided by that of the noise which its output implies."""
    return torch.ones_like(sigma) if prediction == "epsilon" else 1 + sigma**2


def squared_errors(
    unet: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
    prediction: Prediction,
) -> Tensor:
    """Noise latents (b,4,h,w) to the levels of timesteps (b,), and compare what the network returns with its target.

    Returns each picture's mean squared error (b,) in float32. The context is in the UNet's dtype; latents and noise
    may be more exact.
    """
    sigma = prediction.sigma(timesteps).to(latents)[:, None, None, None]  # (b,) -> (b,1,1,1)
    scaled = prediction.scale_in(latents + sigma * noise, sigma).to(conditioning.context.dtype)
    output = unet(scaled, timesteps.to(latents.device), conditioning.context, conditioning.y)
    target = prediction.target(latents, noise, sigma)
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (b,4,h,w) -> (b,)


def epsilon_errors(
    unet: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    context: Tensor,
    y: Tensor,
    prediction: Prediction = EPSILON,
) -> Tensor:
    """Each picture's mean squared error of the noise (b,) that a network's output implies, whatever it predicts."""
    errors = squared_errors(unet, latents, timesteps, noise, Conditioning(context, y), prediction)
    return errors / error_ratio(prediction.kind, prediction.sigma(timesteps)).to(errors)


def encode_conditioning(parts: nn.ModuleDict, batch: Batch, dropped: Tensor) -> Conditioning:
    """What the UNet reads of a batch besides latents and timesteps."""
    context, pooled = encode_captions(parts, batch.captions, dropped)
    return conditioning_of(context, pooled, batch.numbers)


def encode_captions(parts: nn.ModuleDict, captions: Sequence[str], dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Context (b,77,d) and pooled vectors (b,e) of captions, each different one encoded once.

    Where `dropped` (b,) bool is set, they are zeros on a base, and those of the empty prompt on a refiner.
    """
    is_base = "text_encoder" in parts
    openclip = parts["text_encoder_2"]
    prompts = list(captions)
    if not is_base:
        prompts = [
            "" if is_dropped else caption for caption, is_dropped in zip(captions, dropped.tolist(), strict=True)
        ]
    different = list(dict.fromkeys(prompts))
    clip_l = parts["text_encoder"] if is_base else None
    context, pooled = encode_text(clip_l, openclip, different, different, next(openclip.parameters()).device)
    index = torch.tensor([different.index(prompt) for prompt in prompts], device=context.device)  # (b,)
    context = context[index]  # (different,77,d) -> (b,77,d)
    pooled = pooled[index]  # (different,e) -> (b,e)
    if is_base:
        remains = ~dropped.to(context.device)  # (b,)
        context = context * remains[:, None, None]
        pooled = pooled * remains[:, None]
    return context, pooled


def checkpoint_activations(unet: UNet) -> None:
    """Keep only the input of each block, and compute the rest again in the backward pass.

    Chen et al. 2016 (arXiv:1604.06174): less memory for about a third more time, and the same gradients.
    """
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        recompute_activations(block)


def recompute_activations(block: nn.Module) -> None:
    """The same for one block."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
