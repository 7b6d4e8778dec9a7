"""A checkpoint of full size with random weights, in the official layout, for the tests and the benchmark.

Names and shapes are those of our modules on the meta device. Tensors are drawn and written one by one, so that the
memory needed is that of the largest of them. The file stays in a folder and is used again while it is whole:

    SDXL_REF_FULL_DIR   that folder; else `sdxl-ref-full` below the system's folder for temporary files
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdxl_ref.config import BASE_1_0, REFINER_1_0, ModelConfig
from sdxl_ref.weights.checkpoint import build_empty, prefixes

SEED = 0
CHUNK = 1 << 22  # numbers drawn at once
LN_100 = math.log(100.0)  # logit_scale
Shapes = dict[str, tuple[int, ...]]


def folder() -> Path:
    """Where generated files are kept; made if it is not there."""
    path = Path(os.environ.get("SDXL_REF_FULL_DIR") or Path(tempfile.gettempdir()) / "sdxl-ref-full")
    path.mkdir(parents=True, exist_ok=True)
    return path


def full_file(config: ModelConfig = REFINER_1_0) -> Path:
    """The generated float16 file of a model; written if it is not there, or not whole."""
    shapes = names_and_shapes(config)
    start = header(shapes)
    size = len(start) + sum(2 * math.prod(shape) for shape in shapes.values())
    path = folder() / f"random_{config.kind}.safetensors"
    if not is_whole(path, start, size):
        beside = path.with_suffix(f".{os.getpid()}.part")
        try:
            write(beside, start, shapes)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return path


def names_and_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of an official file of this model, sorted by name."""
    shapes: Shapes = {}
    for part, prefix in prefixes(config).items():
        state = build_empty(part, config).state_dict()
        shapes |= {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    shapes["denoiser.sigmas"] = (1000,)  # in the official files too, and read by nobody
    return dict(sorted(shapes.items()))


def header(shapes: Shapes) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "generated": f"random weights, seed {SEED}"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_whole(path: Path, start: bytes, size: int) -> bool:
    """Whether a file of this size with this head is there."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def write(path: Path, start: bytes, shapes: Shapes) -> None:
    with path.open("wb") as file:
        file.write(start)
        for i, (key, shape) in enumerate(shapes.items()):
            mean, spread = distribution(key, shape)
            for noise in draws(i, math.prod(shape)):
                file.write((mean + spread * noise).astype("<f2").tobytes())


def draws(i: int, count: int) -> Iterator[NDArray[np.float32]]:
    """Standard normal numbers of tensor number i, a chunk at a time; each tensor has its own seed."""
    generator = np.random.default_rng([SEED, i])
    for begin in range(0, count, CHUNK):
        yield generator.standard_normal(min(CHUNK, count - begin), dtype=np.float32)


def distribution(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: matrices by fan-in, norms near 1, biases small."""
    if key.endswith("logit_scale"):
        return LN_100, 0.0
    if len(shape) < 2:
        return (1.0 if key.endswith("weight") else 0.0), 0.05
    if "embedding" in key:
        return 0.0, 0.3
    fan_in = shape[0] if key.endswith("text_projection") else math.prod(shape[1:])
    return 0.0, fan_in**-0.5


if __name__ == "__main__":
    import sys

    print(full_file({"refiner": REFINER_1_0, "base": BASE_1_0}[(sys.argv[1:] or ["refiner"])[0]]))
