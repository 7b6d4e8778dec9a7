"""One training step of the refiner's UNet at full size: bfloat16, 512 px, activation checkpointing, AdamW.

Run as a program, in a process of its own, by test_training.py: prints the loss and how far the weights moved.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_ref.training.diffusion import Objective, checkpoint_activations, epsilon_errors
from sdxl_ref.training.loop import Run, Settings
from sdxl_ref.weights.opening import open_checkpoint


class Unsaved(Run):
    """A full-size state is 18 GB: this step is only looked at."""

    def save(self) -> None:
        pass


def main(file: str) -> None:
    unet = open_checkpoint(file).load("unet", torch.bfloat16).train().requires_grad_(True)
    checkpoint_activations(unet)  # type: ignore[arg-type]
    objective = Objective(last=199)
    before = unet.get_parameter("out.2.weight").detach().clone()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        t = torch.randint(objective.first, objective.last + 1, (1,), generator=generator)
        drawn = noise(1, 4, 64, 64), t, noise(1, 4, 64, 64), noise(1, 77, 1280), noise(1, 2560)
        return epsilon_errors(unet, *drawn).mean()

    settings = Settings(steps=1, learning_rate=1e-3, warm_up=0, ema=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Unsaved(nn.ModuleDict({"unet": unet}), settings, Path(folder), {})
        assert list(run.train(loss_of)) == [1]
        print((Path(folder) / "log.csv").read_text().splitlines()[-1])
    print(float((unet.get_parameter("out.2.weight").detach() - before).abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
