"""A tiny file with all that an official one may carry, and the same as a folder."""

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
    tiny_refiner_file: Path,
    tiny_base_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny file with everything that an official one may carry besides its weights."""
    source = tiny_refiner_file if request.param == "refiner" else tiny_base_file
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
def converted_refiner(tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny refiner as a folder, to be read alone."""
    folder = tmp_path_factory.mktemp("converted") / "folder"
    convert(tiny_refiner_file, folder, "diffusers")
    return folder


@pytest.fixture
def folder(converted_refiner: Path, tmp_path: Path) -> Path:
    """The tiny refiner as a folder of the test's own."""
    return Path(shutil.copytree(converted_refiner, tmp_path / "folder"))
