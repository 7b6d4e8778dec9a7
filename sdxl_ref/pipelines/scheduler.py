"""What a pipeline has for the ecosystem's `scheduler`: how its model is run, to read. Loaded when it is asked for.

Samplers here are functions of (denoise, x, sigmas), and a run's arguments say how it steps: so there is no object to
set in another one's place, and what one would do is said in arguments.
"""

from dataclasses import dataclass
from typing import Any

from sdxl_ref.config import Defaults, InputError
from sdxl_ref.diffusion.sampler_names import answer
from sdxl_ref.weights.folder_scheduler import SCHEDULERS, TRAINING, defaults_of

READ_ONLY = "pipe.scheduler cannot be set: the call takes sampler=, spacing=, karras=, eta=, s_noise="


@dataclass(frozen=True)
class SchedulerSettings:
    """How a model's runs step where their arguments leave it open."""

    defaults: Defaults
    prediction: str  # "epsilon" or "v"

    def __str__(self) -> str:
        d = self.defaults
        own = f"refused ({d.refusal})" if d.refusal else f"{d.sampler}, spacing {d.spacing}, karras {d.karras}"
        return f"{own}, prediction {self.prediction}"

    @property
    def config(self) -> dict[str, Any]:
        """The settings in diffusers' words, with which its own classes can be built (`from_config`)."""
        spacing = self.defaults.spacing
        classes = {scheduler.sampler: name for name, scheduler in SCHEDULERS.items()}
        settings: dict[str, Any] = {name: needed for name, (needed, _) in TRAINING.items()}
        settings["_class_name"] = getattr(spacing, "scheduler", classes.get(self.defaults.sampler))
        settings["prediction_type"] = "v_prediction" if self.prediction == "v" else "epsilon"
        settings["timestep_spacing"] = getattr(spacing, "spacing", spacing)
        settings["steps_offset"] = getattr(spacing, "steps_offset", 1)
        sigmas = getattr(spacing, "sigmas", "karras" if self.defaults.karras else "")
        return settings | ({f"use_{sigmas}_sigmas": True} if sigmas else {})

    def __getattr__(self, name: str) -> Any:
        advice = "pipe.plan(pipe.request(prompt=…)).grid has a run's sigmas and timesteps"
        raise AttributeError(f"pipe.scheduler only says how the model is run, and has no {name}: {advice}")


def settings_of(pipe: Any) -> SchedulerSettings:
    """Of the base, where the pipeline is an ensemble."""
    return SchedulerSettings(pipe.defaults, pipe.config.prediction)


def refuse(_pipe: Any, value: Any) -> None:
    """AttributeError; for a scheduler of diffusers' with the arguments that do the same."""
    name = type(value).__name__
    raise AttributeError(f"{READ_ONLY}; {equivalent(name, dict(getattr(value, 'config', {})))}")


scheduler = property(settings_of, refuse)


def equivalent(name: str, settings: dict[str, Any]) -> str:
    """What the arguments of a call are that step as a scheduler of this class with these settings, in words."""
    if name not in SCHEDULERS:
        return answer(name)
    try:
        same = defaults_of(name, settings, name)
    except InputError as error:
        return f"no sampler here does the same: {error}"
    if same.refusal:
        return f"no sampler here does the same: {same.refusal}"
    spacing = getattr(same.spacing, "spacing", same.spacing)
    karras = same.karras or getattr(same.spacing, "karras", False)
    call = f'sampler="{same.sampler}", spacing="{spacing}"' + (", karras=True" if karras else "")
    if same.spacing == spacing:
        return f"{name} with these settings is {call}"
    return (
        f"{name} with these settings is {call}, on Euler's levels; its own ({same.spacing}) are those of a model's "
        "folder whose scheduler/scheduler_config.json asks for them"
    )
