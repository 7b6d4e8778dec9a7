"""What is sharded as one in a UNet whose weights lie on several devices, and the memory that this takes on each.

Source: Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), section 5: stage 3, each process keeps 1/n of all.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from sdxl_ref.config import ModelConfig
from sdxl_ref.networks.unet import ResBlock, Stage, TransformerBlock
from sdxl_ref.weights.checkpoint import build_empty

HELD = 3  # blocks at once in a backward pass: the weights of one, its gradients, and the next one on its way
GB = 1e9


def units(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights are gathered together, by name, inner ones first.

    They are the transformer blocks and the ResBlocks; then the stages, with what they have besides those; then the UNet
    itself (name ""), with the rest.
    """
    modules = dict(unet.named_modules())
    blocks = {name: module for name, module in modules.items() if isinstance(module, ResBlock | TransformerBlock)}
    stages = {name: module for name, module in modules.items() if isinstance(module, Stage)}
    return {**blocks, **stages, "": unet}


def unit_sizes(unet: nn.Module) -> dict[str, int]:
    """The parameters of each unit that no inner one has, in numbers."""
    counted: set[str] = set()
    sizes = {}
    for name, module in units(unet).items():
        own = {f"{name}.{key}".lstrip("."): p.numel() for key, p in module.named_parameters()}
        sizes[name] = sum(size for key, size in own.items() if key not in counted)
        counted |= own.keys()
    return sizes


def largest_gathered(unet: nn.Module) -> int:
    """The most parameters that are whole at once while a block works: its own, and those of what it is in."""
    sizes = unit_sizes(unet)
    return max(
        sum(sizes[outer] for outer in sizes if outer in ("", name) or name.startswith(f"{outer}.")) for name in sizes
    )


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that each of `processes` takes; the first one, which has the most.

    A process keeps ceil(rows / processes) rows of every tensor: as `weights`, as `gradients`, twice in the optimizer's
    `moments`, and in float32 or better in the `averaged` weights, where there are any. `gathered` is the largest block
    as it works, whole, with the layers around it. Activations, and what autocast makes of weights, are not counted.
    """

    processes: int
    weights: int
    gradients: int
    moments: int
    averaged: int
    gathered: int

    @property
    def total(self) -> int:
        """At the worst moment of a backward pass, activations aside."""
        return self.weights + self.gradients + self.moments + self.averaged + HELD * self.gathered

    def line(self) -> str:
        """For the user."""
        kept = {
            "weights": self.weights,
            "gradients": self.gradients,
            "moments": self.moments,
            "averaged weights": self.averaged,
        }
        parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in kept.items() if size)
        block = f"largest block gathered {self.gathered / GB:.3g}, up to {HELD} times"
        head = f"memory of each of {self.processes} processes: {self.total / GB:.3g} GB"
        return f"{head} ({parts}, {block}); activations come on top"


def memory_plan(config: ModelConfig, processes: int, dtype: torch.dtype, has_average: bool) -> MemoryPlan:
    """The plan for a model's UNet, trained in a dtype; from its sizes alone."""
    unet = build_empty("unet", config)
    rows = sum(math.ceil(p.shape[0] / processes) * p[0].numel() for p in unet.parameters())
    kept = rows * dtype.itemsize
    averaged = rows * torch.promote_types(dtype, torch.float32).itemsize if has_average else 0
    return MemoryPlan(processes, kept, kept, 2 * kept, averaged, largest_gathered(unet) * dtype.itemsize)
