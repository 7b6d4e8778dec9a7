"""Fine-tuning: the loss of a cached batch, for a UNet in full, or for a LoRA on it and on the text encoders.

Several processes (`torchrun`) share each step: all draw the same batch, each computes its part of it, and
DistributedDataParallel averages the gradients (of a UNet in shards FSDP does, `sharded.py`), so that n processes with
batches of b make the step of one with n * b.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxl_ref.text.conditioning import conditioning_of
from sdxl_ref.training.buckets import draw_batch
from sdxl_ref.training.data import CachedBatch, Dataset
from sdxl_ref.training.diffusion import Corruption, Objective, encode_captions
from sdxl_ref.training.processes import this_process


class FineTuningLoss(nn.Module):
    """The loss of a batch, as a module, so that DistributedDataParallel can wrap it.

    `parts` are the networks that run: the UNet, and the text encoders where their outputs are not cached.
    `dropped_text` replaces the cached outputs of a dropped caption (`Dataset.dropped_text`). `factors` are a LoRA's.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        objective: Objective,
        dropped_text: tuple[Tensor, Tensor] | None = None,
        factors: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.dropped_text = dropped_text
        self.parts = nn.ModuleDict(dict(parts))
        self.factors = factors

    def forward(self, batch: CachedBatch, unit_noise: Tensor, corruption: Corruption) -> Tensor:
        """The loss (0-d). `unit_noise` (b,4,h,w) picks the latents from their posterior."""
        unet = self.parts["unet"]
        weight = next(unet.parameters())
        context, pooled = self.text(batch, corruption.dropped)
        latents = (batch.mean + batch.std * unit_noise).to(weight.device)
        conditioning = conditioning_of(context.to(weight.device, weight.dtype), pooled.to(weight.device), batch.numbers)
        return self.objective.weighted_loss(unet, latents, corruption, conditioning)

    def text(self, batch: CachedBatch, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Context (b,77,d) and pooled vectors (b,e), as of `encode_captions`, from the cache where it has them."""
        if batch.context is None or batch.pooled is None:
            return encode_captions(self.parts, batch.captions, dropped)
        assert self.dropped_text is not None
        dropped_context, dropped_pooled = self.dropped_text
        context = torch.where(dropped[:, None, None], dropped_context, batch.context)
        pooled = torch.where(dropped[:, None], dropped_pooled, batch.pooled)
        return context, pooled


@dataclass
class FineTuning:
    """The `step_loss` of `Run.train`: draws the batch of a step and computes this process's part of it.

    `batch_size` is the number of pictures in a process's part. `loss` is a `FineTuningLoss`, or the
    DistributedDataParallel of one.
    """

    loss: nn.Module
    data: Dataset
    objective: Objective
    batch_size: int

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        process = this_process()
        indices = draw_batch(self.data.sizes, self.batch_size * process.count, generator)
        batch = self.data.batch(indices)
        unit_noise = torch.randn(batch.mean.shape, generator=generator)
        corruption = self.objective.draw(batch.mean.shape, generator)
        first = process.rank * self.batch_size
        own = slice(first, first + self.batch_size)
        return self.loss(batch.select(own), unit_noise[own], corruption.select(own))
