"""Guidance in an interval of sigma, by step and by picture: against runs with one scale, and by what is evaluated."""

import json
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from cases import sample
from pairs import seeded
from torch import Tensor

from sdxl_ref import SAMPLERS
from sdxl_ref.cli import main
from sdxl_ref.config import InputError

STEPS = pairs.SMALL["num_inference_steps"]


def run(pipe: Any, **changes: Any) -> Tensor:
    latents: Tensor = pipe("a cup", **pairs.SMALL | {"generator": seeded(0)} | changes).images
    return latents


def batches(pipe: Any, **changes: Any) -> list[tuple[float, int]]:
    """Of each call of the UNet: the level, and how many pictures it was handed."""
    calls: list[tuple[float, int]] = []
    levels: list[float] = []

    def wrap(denoise: Any) -> Any:
        def noted(x: Tensor, sigma: Tensor) -> Tensor:
            levels.append(float(sigma))
            return denoise(x, sigma)  # type: ignore[no-any-return]

        return noted

    pipe.wrap_denoiser = wrap
    hook = pipe.unet.register_forward_hook(lambda unet, args, output: calls.append((levels[-1], len(args[0]))))
    try:
        run(pipe, **changes)
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("sampler", sample(SAMPLERS, "heun", "dpmpp_2m"))
def test_outside_the_interval_the_positive_side_runs_alone(sampler: str) -> None:
    calls = batches(pairs.base(), guidance_interval=(0.5, 5.0), sampler=sampler)
    assert {count for sigma, count in calls if 0.5 <= sigma <= 5.0} == {2}
    assert {count for sigma, count in calls if not 0.5 <= sigma <= 5.0} == {1}


def test_both_ends_are_included() -> None:
    pipe = pairs.base()
    sigmas = pipe.plan(pipe.request(prompt="a cup", **pairs.SMALL)).grid.sigmas.tolist()
    calls = batches(pipe, guidance_interval=(sigmas[6], sigmas[3]))
    assert [count for _, count in calls] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]


def test_an_interval_of_all_and_of_nothing() -> None:
    pipe = pairs.base()
    assert torch.equal(run(pipe, guidance_interval=(0, 100)), run(pipe))
    torch.testing.assert_close(run(pipe, guidance_interval=(90, 100)), run(pipe, guidance_scale=1.0))


def test_a_scale_for_each_step() -> None:
    pipe = pairs.base()
    assert torch.equal(run(pipe, guidance_scale=[5.0] * STEPS), run(pipe))
    falling = [8.0 - i / 2 for i in range(STEPS)]
    steps = list(pipe.steps(pipe.request(prompt="a cup", **pairs.SMALL, generator=seeded(0), guidance_scale=falling)))
    first = next(pipe.steps(pipe.request(prompt="a cup", **pairs.SMALL, generator=seeded(0), guidance_scale=8.0)))
    assert torch.equal(steps[0].x, first.x)
    assert not torch.equal(steps[-1].x, run(pipe, guidance_scale=8.0))


def test_a_scale_for_each_picture() -> None:
    pipe = pairs.base()
    both = run(pipe, num_images_per_prompt=2, generator=pairs.seeds(0, 0), guidance_scale=torch.tensor([3.0, 7.0]))
    for picture, scale in zip(both, (3.0, 7.0), strict=True):
        torch.testing.assert_close(picture[None], run(pipe, guidance_scale=scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["refiner", "ensemble"])
def test_refiner_and_ensemble(kind: str) -> None:
    pipe: Any = {"refiner": pairs.refiner, "ensemble": pairs.ensemble}[kind]()
    call = pairs.request() if kind == "refiner" else pairs.SMALL | {"prompt": "a cup"}
    call.pop("guidance_scale", None)
    usual = pipe(**call, generator=seeded(0)).images
    steps = len(pipe.plan(pipe.request(**call)).grid.timesteps)
    assert torch.equal(pipe(**call, generator=seeded(0), guidance_scale=[5.0] * steps).images, usual)
    assert not torch.equal(pipe(**call, generator=seeded(0), guidance_interval=(0.3, 0.4)).images, usual)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a list too short": ({"guidance_scale": [5.0, 4.0]}, "expected a guidance_scale for each of 10 steps"),
    "too many pictures": ({"guidance_scale": torch.ones(3) * 5}, "for each of 1 pictures, found 3"),
    "text": ({"guidance_scale": "high"}, "guidance_scale must be a finite number, one for each step in a list"),
    "not finite": ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    "none": ({"guidance_scale": []}, "guidance_scale must be a finite number, one"),
    "the wrong way round": ({"guidance_interval": (5.0, 1.0)}, "guidance_interval must be two levels"),
    "one end": ({"guidance_interval": 5.0}, "guidance_interval must be two levels"),
    "below 0": ({"guidance_interval": (-1.0, 1.0)}, "guidance_interval must be two levels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_guidance(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        run(pairs.base(), **changes)


def test_settings_and_command_line(tiny_base_file: Path, tmp_path: Path) -> None:
    [picture] = pairs.base()(
        "a cup", **pairs.SMALL | {"output_type": "pil", "guidance_scale": torch.tensor([3.0])}
    ).images
    assert json.loads(picture.info["sdxl_ref"])["guidance_scale"] == [3.0]
    command = ["generate", "--prompt", "a cup", "--base", str(tiny_base_file), "--height", "64", "--width", "64"]
    command += ["--steps", "3", "--guidance-interval", "0.3,5", "--out", str(tmp_path / "a.png")]
    assert main(command) == 0
    assert main([*command[:-4], "--guidance-interval", "5,0.3", *command[-2:]]) == 2
