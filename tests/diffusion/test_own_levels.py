"""`sigmas=` and `timesteps=`: against diffusers on the same weights, what a plan says of them, and bad input."""

import json
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pairs
import pytest
import torch
from diffusers.schedulers import AysSchedules
from pairs import seeded

from sdxl_ref import NoiseSchedule
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.diffusion import own_levels

SIGMAS = AysSchedules["StableDiffusionXLSigmas"]
TIMESTEPS = AysSchedules["StableDiffusionXLTimesteps"]
LISTS: dict[str, dict[str, Any]] = {
    "sigmas": {"sigmas": SIGMAS},
    "sigmas that end above 0": {"sigmas": [10.0, 4.0, 1.5, 0.5, 0.2]},
    "timesteps": {"timesteps": TIMESTEPS},
    "few timesteps": {"timesteps": [999, 500, 100]},
}


def without_steps(call: dict[str, Any]) -> dict[str, Any]:
    """The list says how many there are."""
    return {name: value for name, value in call.items() if name != "num_inference_steps"}


SMALL = without_steps(pairs.SMALL)


@pytest.mark.parametrize("name", LISTS)
def test_text_to_image_is_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.use_the_peers_table(monkeypatch)
    call = without_steps(pairs.text_request(**LISTS[name]))
    mine = pairs.base()(**call, generator=seeded(3)).images
    theirs = pairs.diffusers_base()(**call, generator=seeded(3)).images
    checks.close(mine, theirs, checks.PIPELINE, name)


@pytest.mark.parametrize("strength", [0.35, 1.0])
@pytest.mark.parametrize("name", LISTS)
def test_image_to_image_is_diffusers(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers counts the steps of the strength in the list."""
    pairs.use_the_peers_table(monkeypatch)
    call = without_steps(pairs.request(**LISTS[name], strength=strength))
    mine = pairs.refiner()(**call, generator=seeded(3)).images
    theirs = pairs.diffusers_refiner()(**call, generator=seeded(3)).images
    checks.close(mine, theirs, checks.PIPELINE, name)


def test_an_ensemble_hands_over_inside_its_own_levels() -> None:
    pipe = pairs.ensemble()
    call = SMALL | {"sigmas": SIGMAS, "sampler": "dpmpp_2m"}
    plan = pipe.plan(pipe.request(prompt="a cup", **call))
    above = sum(sigma >= NoiseSchedule().switch_sigma(0.8) for sigma in SIGMAS)
    assert plan.evaluations == (above, 10 - above)
    assert torch.isfinite(pipe("a cup", **call, generator=seeded(0)).images).all()


def test_every_form_of_a_list() -> None:
    pipe = pairs.base()
    call = SMALL | {"generator": None}
    pictures = [
        pipe("a cup", **call | {"generator": seeded(0), "sigmas": form}).images
        for form in (SIGMAS, tuple(SIGMAS), np.array(SIGMAS), torch.tensor(SIGMAS, dtype=torch.float64))
    ]
    assert all(torch.equal(pictures[0], other) for other in pictures[1:])


def test_the_plan_and_the_settings_tell() -> None:
    pipe = pairs.base()
    request = pipe.request(prompt="a cup", **SMALL | {"sigmas": [10.0, 4.0, 0.2]})
    plan = str(pipe.plan(request))
    assert plan == "2 of 2 steps, sigma 10 → 0.2; own sigmas 10, 4, 0.2; the run ends at sigma 0.2: its noise stays in"
    picture = pipe("a cup", **SMALL | {"timesteps": [900, 400], "output_type": "pil"}).images[0]
    recorded = json.loads(picture.info["sdxl_ref"])
    assert recorded["spacing"] == "own timesteps 900, 400"
    assert len(recorded["sigmas"]) == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rising": ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas must fall from each to the next"),
    "below 0": ({"sigmas": [1.0, -1.0]}, "sigmas must be at least two, from a million to 0"),
    "one": ({"sigmas": [1.0]}, "sigmas must be at least two"),
    "text": ({"sigmas": "ays"}, "sigmas must be a list of numbers, found 'ays'"),
    "not a number": ({"sigmas": [float("nan"), 0.0]}, "sigmas must be a list of numbers"),
    "twice": ({"timesteps": [900, 900]}, "timesteps must fall"),
    "too high": ({"timesteps": [1000, 1]}, "timesteps must be from 999 to 0"),
    "none": ({"timesteps": []}, "timesteps must be from 999 to 0"),
    "both": ({"timesteps": [9], "sigmas": [1, 0]}, "sigmas and timesteps both say"),
    "other steps": ({"sigmas": [1, 0], "num_inference_steps": 7}, "sigmas make 1 steps, found num_inference_steps 7"),
    "a spacing": ({"sigmas": [1, 0], "spacing": "trailing"}, "spacing is of no use with sigmas"),
    "Karras": ({"timesteps": [9], "karras": True}, "karras is of no use with timesteps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        pairs.base()("a cup", **SMALL | changes)


def test_from_the_command_line(tiny_base_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "levels.txt").write_text("[14.5, 4.0,\n 1.0 0.0]\n")
    assert own_levels.read(str(tmp_path / "levels.txt")) == own_levels.read("14.5,4,1,0")
    command = ["generate", "--prompt", "a cup", "--base", str(tiny_base_file), "--height", "64", "--width", "64"]
    command += ["--out", str(tmp_path / "a.png"), "--sigmas"]
    assert main([*command, str(tmp_path / "levels.txt")]) == 0
    assert "plan: 3 of 3 steps, sigma 14.5 → 0; own sigmas 14.5, 4, 1, 0" in capsys.readouterr().out
    assert main([*command, "many"]) == 2
    assert "expected numbers with commas between, or a file of them, found 'many'" in capsys.readouterr().err
