"""The settings of a folder's scheduler -> how its model is run.

A setting is honoured, has to have the value that our samplers compute with, or has no effect on what they compute. One
that is missing has the class's own default, as in diffusers. Source: `SchedulerMixin.from_pretrained` in diffusers and
the signatures of its scheduler classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from sdxl_ref.config import Defaults, InputError
from sdxl_ref.diffusion.scheduler_levels import SIGMAS, SchedulerLevels
from sdxl_ref.weights.folder_config import Json, read_json
from sdxl_ref.weights.tensor_files import FOLDER_INDEX

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
TRAINING = {  # of the training schedule: what every class needs of SDXL, and its own default
    "num_train_timesteps": (1000, 1000),
    "beta_start": (0.00085, 0.0001),
    "beta_end": (0.012, 0.02),
    "beta_schedule": ("scaled_linear", "linear"),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
}
OTHER_SIGMAS = {f"use_{name}_sigmas": False for name in SIGMAS}
OF_NO_EFFECT = {  # without what they belong to, which is refused
    "dynamic_thresholding_ratio": "of thresholding",
    "sample_max_value": "of thresholding",
    "clip_sample_range": "of clip_sample",
    "flow_shift": "of use_flow_sigmas",
    "time_shift_type": "of use_dynamic_shifting",
    "skip_prk_steps": "read by PNDM alone",
}


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers' with a sampler that computes the same. `needs`: setting -> (needed value, own default)."""

    sampler: str
    family: str  # of its levels: see `SchedulerLevels`
    honoured: Mapping[str, Any]  # setting -> own default
    needs: Mapping[str, Any] = field(default_factory=dict)


EULER = {"timestep_spacing": "linspace", "steps_offset": 0}
CLIPPED = {"clip_sample": (False, True), "thresholding": (False, False)}
MULTISTEP = EULER | OTHER_SIGMAS | {"final_sigmas_type": "zero"}
MULTISTEP_NEEDS = {
    "solver_order": (2, 2),
    "thresholding": (False, False),
    "lower_order_final": (True, True),
    "use_flow_sigmas": (False, False),
    "use_dynamic_shifting": (False, False),
}
SOLVER = {
    "solver_type": ("midpoint", "midpoint"),
    "euler_at_final": (False, False),
    "use_lu_lambdas": (False, False),
    "lambda_min_clipped": (-float("inf"), -float("inf")),
    "variance_type": (None, None),
}
SCHEDULERS = {
    "EulerDiscreteScheduler": Scheduler(
        "euler",
        "euler",
        EULER | OTHER_SIGMAS | {"final_sigmas_type": "zero"},
        {
            "interpolation_type": ("linear", "linear"),
            "timestep_type": ("discrete", "discrete"),
            "sigma_min": (None, None),
            "sigma_max": (None, None),
        },
    ),
    "EulerAncestralDiscreteScheduler": Scheduler("euler_ancestral", "euler", EULER),
    "HeunDiscreteScheduler": Scheduler("heun", "euler", EULER | OTHER_SIGMAS, {"clip_sample": (False, False)}),
    "LMSDiscreteScheduler": Scheduler("lms", "euler", EULER | OTHER_SIGMAS),
    "DDIMScheduler": Scheduler(
        "ddim", "ddim", {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}, CLIPPED
    ),
    "DDPMScheduler": Scheduler(
        "ddpm",
        "ddim",
        {"timestep_spacing": "leading", "steps_offset": 0},
        CLIPPED | {"variance_type": ("fixed_small", "fixed_small")},
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        "dpmpp_2m", "multistep", MULTISTEP | {"algorithm_type": "dpmsolver++"}, MULTISTEP_NEEDS | SOLVER
    ),
    "UniPCMultistepScheduler": Scheduler(
        "unipc",
        "multistep",
        MULTISTEP,
        MULTISTEP_NEEDS
        | {
            "solver_type": ("bh2", "bh2"),
            "predict_x0": (True, True),
            "disable_corrector": ([], []),
            "solver_p": (None, None),
            "sigma_min": (None, None),
            "sigma_max": (None, None),
            "shift_terminal": (None, None),
        },
    ),
}
ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}


def read_scheduler(folder: Path) -> tuple[str, Defaults]:
    """What the UNet of a folder returns ("epsilon" or "v"), and how its pipeline is run.

    A folder without settings of a scheduler is run in SDXL's own way. InputError for another training schedule.
    """
    index = read_json(folder / FOLDER_INDEX)
    is_base = index.get("text_encoder") not in (None, [None, None])
    for entry in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        if type(index.get(entry)) not in (bool, NoneType):
            raise InputError(f"{folder / FOLDER_INDEX}: expected {entry} true or false, found {index[entry]!r:.60}")
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))  # diffusers' default, for a refiner too
    own_zeros = None if zeros == is_base else zeros
    path = folder / SCHEDULER_CONFIG
    named = index.get("scheduler")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    if not path.is_file():
        missing = "" if name in (None, "EulerDiscreteScheduler") else f"{path} is missing, the settings of {name}"
        return "epsilon", Defaults(zeros=own_zeros, refusal=missing)
    settings = read_json(path)
    name = name or settings.get("_class_name")
    return prediction_of(path, settings), replace(defaults_of(path, settings, str(name)), zeros=own_zeros)


def prediction_of(path: Path, settings: Json) -> str:
    """What the UNet returns, by the settings. InputError for another training schedule than SDXL's."""
    for name, (needed, own_default) in TRAINING.items():
        require_setting(path, settings, name, needed, own_default)
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise InputError(f"{path}: expected prediction_type {' or '.join(PREDICTIONS)}, found {prediction!r}")
    return PREDICTIONS[prediction]


def defaults_of(path: Path, settings: Json, name: str) -> Defaults:
    """How a model is run that has a scheduler of this class, with these settings.

    What only stands in the way of the sampler is a `refusal`, since a request may name another sampler.
    """
    if name not in SCHEDULERS:
        have = ", ".join(SCHEDULERS)
        return Defaults(refusal=f"{path}: the scheduler {name} has no sampler here (there are those of {have})")
    scheduler = SCHEDULERS[name]
    try:
        return Defaults(sampler=sampler_of(path, settings, scheduler), **levels_of(path, settings, name))
    except InputError as error:
        return Defaults(karras=settings.get("use_karras_sigmas") is True, refusal=str(error))


def sampler_of(path: Path, settings: Json, scheduler: Scheduler) -> str:
    """The sampler that computes the same. InputError for a setting that it does not know, or does otherwise."""
    for name, (needed, own_default) in scheduler.needs.items():
        require_setting(path, settings, name, needed, own_default)
    known = {name for other in SCHEDULERS.values() for name in (*other.honoured, *other.needs)}
    known |= {*TRAINING, *OF_NO_EFFECT, "prediction_type"}
    for name, value in settings.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise InputError(f"{path}: the setting {name} {value!r} is not understood")
    if "algorithm_type" not in scheduler.honoured:
        return scheduler.sampler
    algorithm = settings.get("algorithm_type", scheduler.honoured["algorithm_type"])
    if algorithm not in ALGORITHMS:
        raise InputError(f"{path}: expected algorithm_type {' or '.join(ALGORITHMS)}, found {algorithm!r}")
    return ALGORITHMS[algorithm]


def levels_of(path: Path, settings: Json, name: str) -> Json:
    """`spacing`, and perhaps `karras`, of the defaults: a name where a spacing of ours is the same, else the rule."""
    scheduler = SCHEDULERS[name]
    fields = {key: settings.get(key, own_default) for key, own_default in scheduler.honoured.items()}
    for key, value in fields.items():
        if key.startswith("use_") and type(value) not in (bool, NoneType):
            raise InputError(f"{path}: expected {key} true or false, found {value!r:.60}")
    sigmas = [key for key in SIGMAS if fields.get(f"use_{key}_sigmas")]
    spacing = fields["timestep_spacing"]
    offset = fields["steps_offset"]
    is_spacing = spacing in ("leading", "trailing", "linspace")
    if not is_spacing or type(offset) is not int or not 0 <= offset < 1000 or len(sigmas) > 1:
        found = f"timestep_spacing {spacing!r}, steps_offset {offset!r}, {' and '.join(sigmas) or 'no other'} sigmas"
        raise InputError(f"{path}: expected one spacing and one rule of sigmas, found {found}")
    final = fields.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise InputError(f"{path}: expected final_sigmas_type zero or sigma_min, found {final!r}")
    if scheduler.family == "ddim" and spacing == "linspace":
        raise InputError(f"{path}: {name} with the spacing linspace steps between levels that it does not visit")
    ends_at_zero = final == "zero" and bool(fields.get("set_alpha_to_one", True))
    if scheduler.family == "multistep" and not ends_at_zero:
        raise InputError(f"{path}: {name} with final_sigmas_type sigma_min is not to be had")
    rule = SchedulerLevels(name, scheduler.family, spacing, offset, "".join(sigmas), ends_at_zero)
    is_ours = scheduler.family == "euler" and ends_at_zero and rule.sigmas in ("", "karras")
    if is_ours and (spacing != "leading" or offset == 1):
        return {"spacing": spacing, "karras": rule.karras}
    return {"spacing": rule}


def require_setting(path: Path, settings: Json, name: str, needed: Any, own_default: Any) -> None:
    """InputError where a setting, or its default where it is missing, is not what is computed here."""
    value = settings.get(name, own_default)
    if (value or None) != (needed or None):
        absent = "" if name in settings else " (it is missing, and diffusers takes this)"
        raise InputError(f"{path}: expected {name} {needed!r}, found {value!r}{absent}")
