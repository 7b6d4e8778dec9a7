"""A small file with all that an official one may carry, and the same as a folder."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weights_convert.convert import convert


@pytest.fixture(scope="session", params=["refiner", "base"])
def official(
    request: pytest.FixtureRequest,
    small_refiner_file: Path,
    small_base_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small file with everything that an official one may carry besides its weights."""
    source = small_refiner_file if request.param == "refiner" else small_base_file
    state = load_file(source)
    state["denoiser.sigmas"] = torch.linspace(0, 14, 1000).half()
    state["model_ema.decay"] = torch.tensor(0.5)
    if request.param == "base":
        state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() | {"modelspec.author": "a test"}
    path = tmp_path_factory.mktemp("official") / "official.safetensors"
    save_file(state, path, metadata)
    return path


@pytest.fixture(scope="session")
def converted(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official file as a folder, to be read alone."""
    folder = tmp_path_factory.mktemp("converted") / "folder"
    convert(official, folder, "diffusers")
    return folder


@pytest.fixture(scope="session")
def converted_refiner(small_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small refiner as a folder, to be read alone."""
    folder = tmp_path_factory.mktemp("converted") / "folder"
    convert(small_refiner_file, folder, "diffusers")
    return folder


@pytest.fixture
def folder(converted_refiner: Path, tmp_path: Path) -> Path:
    """The small refiner as a folder of the test's own."""
    return Path(shutil.copytree(converted_refiner, tmp_path / "folder"))
