"""Names of samplers as other tools write them are answered with ours, or with those that there are."""

import inspect

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.sampler_names import answer
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.pipelines.request import Request

WEB_UI = {  # AUTOMATIC1111's
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "UniPC": "unipc",
}
OTHERS = {
    "k_euler_a": "euler_ancestral",  # InvokeAI's
    "k_lms": "lms",
    "sample_dpmpp_2m": "dpmpp_2m",  # k-diffusion's
    "uni_pc": "unipc",  # ComfyUI's
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "EULER": "euler",
    "dpm++ 2s ancestral": "dpmpp_2s_ancestral",
    "DPMPP 2M": "dpmpp_2m",
}
DIFFUSERS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}


@pytest.mark.parametrize(("theirs", "ours"), [*WEB_UI.items(), *OTHERS.items(), *DIFFUSERS.items()])
def test_a_name_is_answered_with_ours(theirs: str, ours: str) -> None:
    assert ours in SAMPLERS
    with pytest.raises(InputError) as caught:
        Request(prompt="", sampler=theirs)
    assert str(caught.value) == (
        f'the sampler {theirs!r} is called {ours} here: write --sampler {ours}, in Python sampler="{ours}"'
    )


@pytest.mark.parametrize(("theirs", "ours"), WEB_UI.items())
def test_a_name_with_karras_is_answered_with_the_schedule(theirs: str, ours: str) -> None:
    """Which goes between the ends of the whole training range there: linspace's here."""
    assert answer(f"{theirs} Karras") == (
        f"the sampler '{theirs} Karras' is called {ours} here: write --sampler {ours} --karras --spacing linspace, "
        f'in Python sampler="{ours}", karras=True, spacing="linspace"'
    )


def test_every_name_of_diffusers_is_answered_with_the_same_sampler_or_as_unknown() -> None:
    """Every scheduler that its SDXL pipelines can be given."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    names = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    assert set(DIFFUSERS) <= set(names)
    for name in set(names) - set(DIFFUSERS):
        assert answer(name).startswith(f"unknown sampler {name!r}")
        assert "expected one of euler, ddim" in answer(name)


@pytest.mark.parametrize(
    "name",
    ["DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2M SDE Heun", "DPM fast", "LCM", "PLMS", "Restart", "Euler CFG++", ""],
)
def test_a_sampler_that_there_is_not_is_unknown(name: str) -> None:
    assert answer(name).startswith(f"unknown sampler {name!r}")


def test_no_name_of_ours_is_taken_for_another() -> None:
    for name in SAMPLERS:
        assert f"is called {name} here" in answer(name.upper())
        assert inspect.isfunction(SAMPLERS[name])


@pytest.mark.parametrize("name", [None, 5, []])
def test_what_is_no_name(name: object) -> None:
    assert answer(name).startswith(f"unknown sampler {name!r}")
