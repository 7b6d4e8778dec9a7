"""`pipe.scheduler`: how a model is run, to read; what a scheduler of diffusers' is in arguments."""

from typing import Any

import diffusers
import pairs
import pytest

from sdxl_ref.config import Defaults
from sdxl_ref.diffusion.scheduler_levels import SchedulerLevels
from sdxl_ref.weights.folder_scheduler import defaults_of


def pipe_with(**defaults: Any) -> Any:
    pipe = pairs.base()
    pipe.defaults = Defaults(**defaults)
    return pipe


def test_it_says_how_the_model_is_run() -> None:
    assert str(pipe_with().scheduler) == "euler, spacing leading, karras False, prediction epsilon"
    assert str(pipe_with(refusal="no such sampler").scheduler) == "refused (no such sampler), prediction epsilon"
    assert str(pairs.ensemble().scheduler) == str(pairs.base().scheduler)


@pytest.mark.parametrize(
    "defaults",
    [
        {},
        {"sampler": "heun", "spacing": "trailing", "karras": True},
        {
            "sampler": "dpmpp_2m",
            "spacing": SchedulerLevels("DPMSolverMultistepScheduler", "multistep", "linspace", 0, "karras"),
        },
    ],
)
def test_diffusers_builds_the_same_of_its_config(defaults: Any) -> None:
    """There and back: the settings of the scheduler that is built are read as the defaults that were told."""
    config = pipe_with(**defaults).scheduler.config
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    assert defaults_of("peer", dict(peer.config), config["_class_name"]) == Defaults(**defaults)


def test_it_cannot_be_changed() -> None:
    pipe = pairs.base()
    with pytest.raises(AttributeError):
        pipe.scheduler.defaults = Defaults()
    with pytest.raises(AttributeError, match=r"only says how the model is run, and has no set_timesteps: pipe.plan"):
        pipe.scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EulerAncestralDiscreteScheduler", {}, 'is sampler="euler_ancestral", spacing="leading"$'),
        (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True},
            'is sampler="dpmpp_2m", spacing="leading", karras=True, on Euler\'s levels; its own .* folder',
        ),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            'is sampler="dpmpp_2m_sde", spacing="leading", on Euler\'s',
        ),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "no sampler here does the same: .*solver_order 2, found 3"),
        ("LCMScheduler", {}, "unknown sampler 'LCMScheduler'"),
    ],
)
def test_a_scheduler_that_is_set_is_answered_with_arguments(name: str, options: Any, message: str) -> None:
    pipe = pairs.base()
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    with pytest.raises(AttributeError, match=message) as error:
        pipe.scheduler = scheduler
    assert "cannot be set: the call takes sampler=, spacing=, karras=" in str(error.value)
    assert "\n" not in str(error.value)
