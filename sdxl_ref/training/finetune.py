"""Fine-tuning: a UNet in full, or a LoRA on it and on the text encoders, on a folder of captioned pictures.

Several processes (`torchrun`) share each step: all draw the same batch, each computes its part of it, and
DistributedDataParallel averages the gradients, so that n processes with batches of b make the step of one with n * b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sdxl_ref import lora_forms
from sdxl_ref.checkpoint import Checkpoint, prefixes
from sdxl_ref.conditioning import embed_numbers
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.folder import is_finite
from sdxl_ref.saving import write
from sdxl_ref.training.adapters import learned
from sdxl_ref.training.data import Dataset, Rows, draw
from sdxl_ref.training.diffusion import Drawn, Objective, text
from sdxl_ref.training.loop import Run

ADAPTERS = {"kohya": "lora_kohya.safetensors", "peft": "lora_peft.safetensors"}
CHECKPOINT = "finetuned.safetensors"


class Loss(nn.Module):
    """The loss of a batch, as a module, so that DistributedDataParallel can wrap it.

    `parts` are the networks that run: the UNet, and the text encoders where their outputs are not cached. `empty` is
    what stands in for the cached outputs of a dropped caption (`Dataset.empty`). `factors` are those of a LoRA.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Mapping[str, nn.Module],
        objective: Objective,
        empty: tuple[Tensor, Tensor] | None = None,
        factors: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.config, self.objective, self.empty = config, objective, empty
        self.parts, self.factors = nn.ModuleDict(dict(parts)), factors

    def forward(self, rows: Rows, spread: Tensor, drawn: Drawn) -> Tensor:
        """Rows of the data, noise (b,4,h,w) that picks latents from their posterior, and what the objective drew."""
        unet = self.parts["unet"]
        weight = next(unet.parameters())
        context, pooled = self.text(rows, drawn.dropped)
        latents = (rows.mean + rows.std * spread).to(weight.device)
        numbers = embed_numbers(rows.numbers.to(weight.device))
        y = torch.cat([pooled.to(weight.device).float(), numbers], dim=1)
        return self.objective.weighted(unet, latents, drawn, context.to(weight), y)

    def text(self, rows: Rows, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Context (b,77,d) and pooled vectors (b,e), from the cache where it has them; as `diffusion.text` has them."""
        if rows.context is None or rows.pooled is None:
            return text(self.parts, rows.captions, dropped)
        assert self.empty is not None
        context, pooled = self.empty
        return (
            torch.where(dropped[:, None, None], context, rows.context),
            torch.where(dropped[:, None], pooled, rows.pooled),
        )


@dataclass
class FineTuning:
    """Draws the batches of a run; an object of this class is the `loss_of` of `Run.train`.

    `size` is the number of pictures in a process's batch. `loss` is a `Loss`, or the DistributedDataParallel of one.
    """

    loss: nn.Module
    data: Dataset
    objective: Objective
    size: int

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        rank, world = place_in_world()
        index = draw(self.data.sizes, self.size * world, generator)
        rows = self.data.batch(index)
        spread = torch.randn(rows.mean.shape, generator=generator)
        drawn = self.objective.draw(rows.mean.shape, generator)
        mine = slice(rank * self.size, (rank + 1) * self.size)
        text = None if rows.context is None else rows.context[mine], None if rows.pooled is None else rows.pooled[mine]
        own = Rows(rows.mean[mine], rows.std[mine], rows.captions[mine], rows.numbers[mine], *text)
        return self.loss(own, spread[mine], Drawn(*(each[mine] for each in drawn)))


def place_in_world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def replicated(loss: Loss, some_unused: bool) -> DistributedDataParallel | None:
    """The wrapper that averages gradients over the processes; None where there is only one."""
    if not distributed.is_initialized():
        return None
    return DistributedDataParallel(loss, find_unused_parameters=some_unused)


def fingerprint(module: nn.Module) -> str:
    """sha256 over a network's configuration and its tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(repr(getattr(module, "config", None)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_adapter(folder: Path, config: ModelConfig, factors: nn.ModuleDict, run: Run) -> list[Path]:
    """What was learned, as a file in kohya's form and one in PEFT's."""
    adapter, metadata = learned(factors, run.averaged), lora_forms.metadata(config)
    paths = [folder / name for name in ADAPTERS.values()]
    for place, layer in adapter.layers.items():
        if not (is_finite(layer.down) and is_finite(layer.up)):
            raise InputError(f"the LoRA of {place.part}.{place.key} is not finite: use a lower learning rate")
    for form, path in zip(ADAPTERS, paths, strict=True):
        write(path, lora_forms.tensors(adapter, config, form), metadata)
    return paths


def write_checkpoint(folder: Path, source: Checkpoint, unet: nn.Module, run: Run) -> Path:
    """The source with the UNet in its place: official layout, every tensor in the dtype that it had there."""
    path, prefix = folder / CHECKPOINT, prefixes(source.config)["unet"]
    trained = unet.state_dict() | run.averaged
    with source.reader() as read:
        state = {key: read(key) for key in source.shapes}  # mapped, not read
        for name, tensor in trained.items():
            dtype = state[prefix + name].dtype
            state[prefix + name] = tensor.to("cpu", dtype)
            if not is_finite(state[prefix + name]):
                raise InputError(f"{prefix + name} does not fit into {dtype}, the source's: train from a float32 file")
        metadata = {key: text for key, text in source.metadata.items() if key != "modelspec.hash_sha256"}
        write(path, {key: tensor.contiguous() for key, tensor in state.items()}, metadata)
    return path
