"""What the stages of the recipe share: a folder, the settings of those that train, and what they hand on."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.pocket.examples import Label, Pixels, training_set
from sdxl_ref.pocket.models import CONFIGS
from sdxl_ref.training.loop import Run, Settings, StepLoss
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.tensor_files import sha256_of

SCENES = 40_000  # pictures of the training set
SETTINGS = {
    "towers": Settings(steps=3_000, learning_rate=2e-3, ema=0.99),
    "vae": Settings(steps=6_000, learning_rate=1e-3, weight_decay=0.0),
    "vae-more": Settings(steps=9_000, learning_rate=1e-3, weight_decay=0.0, seed=1),
    "base": Settings(steps=6_000, learning_rate=1e-3),
    "refiner": Settings(steps=3_500, learning_rate=1e-3),
    "base-more": Settings(steps=5_500, learning_rate=1e-3, seed=1),
    "refiner-more": Settings(steps=2_500, learning_rate=8e-4, seed=1),
    "base-last": Settings(steps=2_000, learning_rate=8e-4, seed=2),
    "refiner-last": Settings(steps=2_000, learning_rate=8e-4, seed=2),
}


class RecipeFolder:
    """Where the stages leave their results, `STAGE.safetensors`, and on which device they work.

    `configs` are the sizes of the pair: of its "base" and its "refiner", which share an autoencoder and OpenCLIP.
    """

    def __init__(
        self, path: Path, device: torch.device, scenes: int = SCENES, configs: Mapping[str, ModelConfig] = CONFIGS
    ) -> None:
        self.path = path
        self.device = device
        self.scenes = scenes
        self.configs = configs
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"could not make the folder {path}: {error.strerror}") from error
        clear(path)

    def result_path(self, stage: str) -> Path:
        return self.path / f"{stage}.safetensors"

    def result(self, stage: str) -> dict[str, Tensor]:
        """What a stage has written. InputError where it has not come to its end, or the file is damaged."""
        path = self.result_path(stage)
        if not path.exists():
            raise InputError(f"{path} is not there: run the stage {stage!r} first, to its end")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"could not read {path} ({error}): run the stage {stage!r} again") from error

    def write_result(self, stage: str, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        write_tensors(self.result_path(stage), tensors, metadata or {})

    def hashes(self, *stages: str) -> dict[str, str]:
        """sha256 of what stages have written: a stage that learned from it is not resumed with another."""
        return {stage: sha256_of(self.result_path(stage)) for stage in stages}

    def pictures(self) -> tuple[Pixels, list[Label]]:
        """The training set (n,128,128,3), and its labels."""
        return training_set(self.path, self.scenes)

    def train(
        self,
        stage: str,
        run: Run,
        step_loss: StepLoss,
        stop: int | None,
        after_step: Callable[[int], None] | None = None,
    ) -> bool:
        """Train a stage to its end, or to step `stop`. Whether it is at its end and has its result to write."""
        if run.step == run.settings.steps and self.result_path(stage).exists():
            return False
        for step in run.train(step_loss, stop=stop):
            if after_step is not None:
                after_step(step)
        return run.step == run.settings.steps


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one network in the state of several, under the network's own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
