"""The training pictures: the same each time, with labels that say what happened to them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdxl_ref.config import InputError
from sdxl_ref.pocket.examples import Label, example, training_set
from sdxl_ref.pocket.scenes import PASTEL
from sdxl_ref.pocket.stages import RecipeFolder


def test_examples_are_deterministic_and_tell_what_happened() -> None:
    first = [example(i) for i in range(60)]
    again = [example(i) for i in range(60)]
    for (pixels, label), (other_pixels, other_label) in zip(first, again, strict=True):
        assert np.array_equal(pixels, other_pixels)
        assert label == other_label
    soft = [pixels for pixels, label in first if label.original_side == 64]
    assert 0 < len(soft) < 20
    assert {(label.original_side, label.score) for _, label in first} == {(64, 2.5), (128, 6.0)}
    edges = [np.abs(np.diff(pixels.astype(float), axis=0)).max() for pixels in soft]
    assert max(edges) < 255  # no hard edge is left
    pale, label = example(0, look=PASTEL)
    assert label == first[0][1]
    assert pale.mean() > first[0][0].mean()  # the same scene, painted otherwise


def test_the_numbers_of_a_label_are_those_that_a_unet_reads() -> None:
    label = Label("a red circle", 64, 2.5)
    assert label.numbers("base").tolist() == [64, 64, 0, 0, 128, 128]
    assert label.numbers("refiner").tolist() == [64, 64, 0, 0, 2.5]


def test_the_training_set_is_drawn_once(tmp_path: Path) -> None:
    pixels, labels = training_set(tmp_path, 3)
    assert len(pixels) == 3
    for i in range(3):
        assert np.array_equal(pixels[i], example(i)[0])
        assert labels[i] == example(i)[1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"pixels.npy", "told.json"}  # nothing half written is left
    again, _ = training_set(tmp_path, 3)
    assert np.array_equal(again, pixels)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"expected 4 pictures, found 3 and 3 labels\): delete them"):
        training_set(tmp_path, 4)


def test_pictures_are_not_drawn_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"40000 pictures need 2\.0 GB in .*, found 0\.0 GB free"):
        RecipeFolder(tmp_path, torch.device("cpu")).pictures()
    assert not list(tmp_path.iterdir())
