"""What the tests of adapters share: a refiner, and files of adapters for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
from adapter_files import CONFIGS, pipeline, random_file


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def refiner() -> Any:
    return pipeline(peers.TINY_REFINER)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Random adapters of a refiner, each the same whenever it is asked for."""

    def make(name: str, **options: Any) -> Path:
        return random_file(peers.TINY_REFINER, tmp_path / f"{name}.safetensors", sum(name.encode()), **options)

    return make
