"""Tiny models and pictures that the tests of training share."""

from pathlib import Path

import pytest
from training_data import Networks, networks
from training_runs import save_model, save_pictures


@pytest.fixture(scope="session")
def refiner_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "refiner.safetensors")


@pytest.fixture(scope="session")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base.safetensors", "base")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four captioned pictures of one size."""
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def base() -> Networks:
    return networks("base")


@pytest.fixture
def refiner() -> Networks:
    return networks("refiner")
