"""`sdxl-ref refine` on a file of full size and the photo that ships, against diffusers' pipeline on the same file."""

import os
import sys
from importlib.resources import files
from pathlib import Path

import diffusers_refine
import full_file
import measure
import numpy as np
import pytest
from PIL import Image

from sdxl_ref.config import BASE_1_0, REFINER_1_0

pytestmark = pytest.mark.full

PHOTO = str(files("sdxl_ref") / "data" / "photo.jpg")
SDXL_REF = str(Path(sys.executable).with_name("sdxl-ref"))
ARGUMENTS = [
    PHOTO,
    *("--prompt", "a cup of coffee on a wooden table"),
    *("--steps", "10", "--strength", "0.3", "--guidance-scale", "5", "--seed", "0"),
]
TESTS = Path(diffusers_refine.__file__).parents[1]


def refine(dtype: str, out: Path) -> measure.Measured:
    command = [SDXL_REF, "refine", *ARGUMENTS]
    file = str(full_file.full_file())
    measured = measure.measure([*command, "--checkpoint", file, "--dtype", dtype, "--out", str(out)])
    told("sdxl-ref refine", dtype, measured)
    return measured


def diffusers(dtype: str, out: Path, folder: Path) -> measure.Measured:
    command = [sys.executable, diffusers_refine.__file__, *ARGUMENTS, "--checkpoint", str(full_file.full_file())]
    command += ["--folder", str(folder), "--dtype", dtype, "--out", str(out)]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    measured = measure.measure(command, HF_HUB_OFFLINE="1", PYTHONPATH=path)
    told("diffusers", dtype, measured)
    return measured


def told(what: str, dtype: str, m: measure.Measured) -> None:
    peak, anonymous = m.peak / 1e9, m.peak_anonymous / 1e9
    print(f"\n{what}, {dtype}: {m.seconds:.0f} s, peak memory {peak:.2f} GB ({anonymous:.2f} GB of it anonymous)")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_float32_picture_is_that_of_diffusers(tmp_path: Path) -> None:
    """The same seed draws the same noise on both sides; no value of any pixel differs by more than 1 of 255."""
    measured = refine("float32", tmp_path / "ours.png")
    assert "3 of 10 steps" in measured.output
    diffusers("float32", tmp_path / "theirs.png", diffusers_refine.write_folder(tmp_path / "folder"))
    ours, theirs = pixels(tmp_path / "ours.png"), pixels(tmp_path / "theirs.png")
    assert ours.shape == theirs.shape == (512, 512, 3)
    difference = np.abs(ours - theirs)
    inside = ((theirs > 0) & (theirs < 255)).mean()
    print(f"largest difference {difference.max()} of 255, in {(difference > 0).mean():.4%} of the values;")
    print(f"{inside:.0%} of the values lie between black and white, their spread is {theirs.std():.0f}")
    assert inside > 0.2
    assert theirs.std() > 5
    assert difference.max() <= 1


def test_bfloat16_ends(tmp_path: Path) -> None:
    refine("bfloat16", tmp_path / "ours.png")
    picture = pixels(tmp_path / "ours.png")
    assert picture.shape == (512, 512, 3)
    assert picture.std() > 5


def test_ensemble_in_low_memory(tmp_path: Path) -> None:
    """Base and refiner, 13 GB of files, in under 10 GB: one set of weights at a time."""
    out = tmp_path / "ensemble.png"
    base, refiner = (str(full_file.full_file(config)) for config in (BASE_1_0, REFINER_1_0))
    command = [SDXL_REF, "generate", "--base", base, "--refiner", refiner, "--prompt", "a cup of coffee"]
    command += ["--height", "256", "--width", "256", "--steps", "10", "--dtype", "bfloat16", "--low-memory"]
    measured = measure.measure([*command, "--out", str(out)])
    told("sdxl-ref generate --low-memory, base and refiner", "bfloat16", measured)
    assert "plan: base 8 evaluations" in measured.output
    picture = pixels(out)
    assert picture.shape == (256, 256, 3)
    assert picture.std() > 5
    assert measured.peak < 10e9
