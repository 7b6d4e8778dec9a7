"""For the tests of the training loop: a small module in training."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_ref.training.loop import Run, Settings

SETTINGS = Settings(steps=12, learning_rate=1e-2, warm_up=3, seed=5)


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def train(folder: Path, stop: int | None = None, settings: Settings = SETTINGS, save_every: int = 5) -> Run:
    net = module()

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 8, generator=generator)
        return ((net(x) - x.flip(1)) ** 2).mean()

    run = Run(net, settings, folder, {"model": "a small one"})
    for _ in run.train(step_loss, save_every, stop):
        pass
    return run
