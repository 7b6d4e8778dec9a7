"""One small file of each kind of model, and a photo."""

from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref.parity.kit import photo_for
from sdxl_ref.weights.checkpoint_saving import save_checkpoint


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """float32, with the configuration in the metadata."""
    folder = tmp_path_factory.mktemp("files")
    paths = {kind: folder / f"{kind}.safetensors" for kind in checkpoints.CONFIGS}
    for kind, config in checkpoints.CONFIGS.items():
        save_checkpoint(paths[kind], config, checkpoints.parts_of(config), torch.float32)
    return paths


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photo that ships, in 64 pixels a side."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    photo_for(64).save(path)
    return path


@pytest.fixture
def state(files: dict[str, Path]) -> dict[str, Tensor]:
    """The refiner's tensors, for the test to change."""
    return load_file(files["refiner"])
