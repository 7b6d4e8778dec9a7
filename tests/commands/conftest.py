"""A photo, an empty folder to run in, and `refine` on a tiny checkpoint."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Refine
from PIL import Image

from sdxl_ref.weights.checkpoint import Checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small run no faster on several, and far slower where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64x64, smooth."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the command runs in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refine(photo: Path, tiny_refiner_file: Path) -> Refine:
    return Refine(photo, tiny_refiner_file)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's UNet has been read."""
    counts: Counter[str] = Counter()
    load = Checkpoint.load

    def counted(self: Checkpoint, part: str, *rest: Any) -> Any:
        counts[self.path.name] += part == "unet"
        return load(self, part, *rest)

    monkeypatch.setattr(Checkpoint, "load", counted)
    return counts
