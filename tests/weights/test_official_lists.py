"""Our networks at full size against the lists of keys and shapes that the official code builds."""

from pathlib import Path

import pytest
from checkpoints import RELEASED, expected_shapes, listed_shapes, released, sparse_file

from sdxl_ref.weights.checkpoint import build_empty, prefixes
from sdxl_ref.weights.identity import name_of
from sdxl_ref.weights.opening import open_checkpoint

COMMON = {"vae": 83_653_863, "text_encoder_2": 694_659_841}
PARAMETERS = {
    "refiner": COMMON | {"unet": 2_259_526_660},
    "base": COMMON | {"unet": 2_567_463_684, "text_encoder": 123_060_480},
}


@pytest.mark.parametrize(("kind", "count"), [("refiner", 1859), ("base", 2515)])
def test_keys_and_shapes_are_the_official_ones(kind: str, count: int) -> None:
    listed = listed_shapes(kind)
    ours = expected_shapes(RELEASED[kind][0])
    assert len(listed) == count
    assert set(listed) - set(ours) == {"denoiser.sigmas"}  # the schedule, which is computed
    assert set(ours) - set(listed) == set()
    assert {key: (shape, listed[key]) for key, shape in ours.items() if shape != listed[key]} == {}


@released
def test_parameter_counts(kind: str) -> None:
    config = RELEASED[kind][0]
    counts = {part: sum(p.numel() for p in build_empty(part, config).parameters()) for part in prefixes(config)}
    assert counts == PARAMETERS[kind]


@released
def test_a_file_is_told_by_its_header(kind: str, tmp_path: Path) -> None:
    found = open_checkpoint(sparse_file(tmp_path / "a.safetensors", listed_shapes(kind)))
    assert found.config == RELEASED[kind][0]
    assert name_of(found) == f"SD-XL 1.0 {kind} (by its keys and shapes)"
    assert found.note == ""
