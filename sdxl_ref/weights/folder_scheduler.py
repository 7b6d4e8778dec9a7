"""The settings of a folder's scheduler -> how its model is run.

A setting is honoured, has to have the value that our samplers compute with, or has no effect on what they compute. One
that is missing has the class's own default, as in diffusers. Source: `SchedulerMixin.from_pretrained` in diffusers and
the signatures of its scheduler classes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion.scheduler_levels import SIGMAS, SchedulerLevels
from sdxl_ref.weights.checkpoint import SETTINGS_KEY, Checkpoint
from sdxl_ref.weights.folder_config import FLAGS, check_flags, check_none_left_out, is_same
from sdxl_ref.weights.json_files import Json, read_json, read_json_if_there
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
SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}
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


def read_scheduler(folder: Path, kind: str) -> tuple[str, Defaults]:
    """What the UNet of a folder returns ("epsilon" or "v"), and how the pipeline of a base or refiner is run.

    A folder without settings of a scheduler is run in SDXL's own way. InputError for another training schedule.
    """
    path = folder / SCHEDULER_CONFIG
    return run_as(path, read_json(folder / FOLDER_INDEX), read_json_if_there(path), kind)


def kept_settings(file: Path, metadata: Mapping[str, str], kind: str) -> tuple[str, Defaults]:
    """The same of a file whose metadata keep these two files of the folder that it was converted from."""
    where = f"{file}, {SETTINGS_KEY} in the metadata"
    kept = kept_files(where, metadata)
    index = kept.get(FOLDER_INDEX, {})
    check_flags(where, index, kind)
    return run_as(where, index, kept.get(SCHEDULER_CONFIG), kind)


def kept_files(where: str, metadata: Mapping[str, str]) -> dict[str, Json]:
    """The two files of a folder, or one of them, that a file's metadata keep. InputError where they are none."""
    text = metadata.get(SETTINGS_KEY, "{}")
    try:
        files = dict(json.loads(text))
        return {name: dict(files[name]) for name in (FOLDER_INDEX, SCHEDULER_CONFIG) if name in files}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: expected settings as a conversion writes them, found {text!r:.60}") from error


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata for a file that is made of a model: they keep what a folder says of how it is run."""
    metadata = dict(checkpoint.metadata)
    if not checkpoint.path.is_dir() or checkpoint.defaults == SDXL:
        return metadata
    index = read_json(checkpoint.path / FOLDER_INDEX)
    files = {FOLDER_INDEX: {name: index[name] for name in FLAGS if name in index}}
    settings = read_json_if_there(checkpoint.path / SCHEDULER_CONFIG)
    _, name = index.get("scheduler") or (None, None)
    if settings is None:
        files[FOLDER_INDEX]["scheduler"] = index.get("scheduler")
    else:
        files[SCHEDULER_CONFIG] = settings | ({"_class_name": name} if name else {})
    return metadata | {SETTINGS_KEY: json.dumps(files)}


def run_as(where: object, index: Json, settings: Json | None, kind: str) -> tuple[str, Defaults]:
    """What a UNet returns, and how its pipeline is run, by an index and the settings of the scheduler it names."""
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))  # diffusers' default, for a refiner too
    own_zeros = None if zeros == (kind == "base") else zeros
    named = index.get("scheduler")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    if settings is None:
        missing = "" if name in (None, "EulerDiscreteScheduler") else f"{where} is missing, the settings of {name}"
        return "epsilon", Defaults(zeros=own_zeros, refusal=missing)
    check_none_left_out(where, settings)
    name = name or settings.get("_class_name")
    return prediction_of(where, settings), replace(defaults_of(where, settings, name), zeros=own_zeros)


def prediction_of(where: object, settings: Json) -> str:
    """What the UNet returns, by the settings. InputError for another training schedule than SDXL's."""
    for name, (needed, own_default) in TRAINING.items():
        require_setting(where, settings, name, needed, own_default)
    return chosen(where, settings, "prediction_type", "epsilon", PREDICTIONS)


def defaults_of(where: object, settings: Json, name: object) -> Defaults:
    """How a model is run that has a scheduler of this class, with these settings.

    What only stands in the way of the sampler is a `refusal`, since a request may name another sampler.
    """
    if not isinstance(name, str) or name not in SCHEDULERS:
        found = (
            "no class of a scheduler is named" if name is None else f"the scheduler {name!s:.60} has no sampler here"
        )
        return Defaults(refusal=f"{where}: {found} (there are those of {', '.join(SCHEDULERS)})")
    scheduler = SCHEDULERS[name]
    try:
        return Defaults(sampler=sampler_of(where, settings, scheduler), **levels_of(where, settings, name))
    except InputError as error:
        return Defaults(karras=settings.get("use_karras_sigmas") is True, refusal=str(error))


def sampler_of(where: object, settings: Json, scheduler: Scheduler) -> str:
    """The sampler that computes the same. InputError for a setting that it does not know, or does otherwise."""
    for name, (needed, own_default) in scheduler.needs.items():
        require_setting(where, settings, name, needed, own_default)
    known = {name for other in SCHEDULERS.values() for name in (*other.honoured, *other.needs)}
    known |= {*TRAINING, *OF_NO_EFFECT, "prediction_type"}
    for name, value in settings.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise InputError(f"{where}: the setting {name} {value!r:.60} is not understood")
    if "algorithm_type" not in scheduler.honoured:
        return scheduler.sampler
    return chosen(where, settings, "algorithm_type", scheduler.honoured["algorithm_type"], ALGORITHMS)


def levels_of(where: object, settings: Json, name: str) -> Json:
    """`spacing`, and perhaps `karras`, of the defaults: a name where a spacing of ours is the same, else the rule."""
    scheduler = SCHEDULERS[name]
    fields = {key: settings.get(key, own_default) for key, own_default in scheduler.honoured.items()}
    for key, value in fields.items():
        if key.startswith("use_") and type(value) not in (bool, NoneType):
            raise InputError(f"{where}: expected {key} true or false, found {value!r:.60}")
    sigmas = [key for key in SIGMAS if fields.get(f"use_{key}_sigmas")]
    spacing = chosen(where, fields, "timestep_spacing", "", SPACINGS)
    offset = fields["steps_offset"]
    if type(offset) not in (int, float) or offset not in range(1000):
        raise InputError(f"{where}: expected steps_offset a whole number from 0 to 999, found {offset!r:.60}")
    if len(sigmas) > 1:
        raise InputError(f"{where}: expected one rule of sigmas, found {' and '.join(sigmas)}")
    final = fields.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise InputError(f"{where}: expected final_sigmas_type zero or sigma_min, found {final!r}")
    if scheduler.family == "ddim" and spacing == "linspace":
        raise InputError(f"{where}: {name} with the spacing linspace steps between levels that it does not visit")
    ends_at_zero = final == "zero" and bool(fields.get("set_alpha_to_one", True))
    if scheduler.family == "multistep" and not ends_at_zero:
        raise InputError(f"{where}: {name} with final_sigmas_type sigma_min is not to be had")
    rule = SchedulerLevels(name, scheduler.family, spacing, int(offset), "".join(sigmas), ends_at_zero)
    if scheduler.family == "euler" and ends_at_zero and rule.sigmas in ("", "karras") and offset == 1:
        return {"spacing": spacing, "karras": rule.karras}
    return {"spacing": rule}


def chosen(where: object, settings: Json, name: str, own_default: str, meanings: Mapping[str, str]) -> str:
    """What the word of a setting means. InputError for another word."""
    word = settings.get(name, own_default)
    if not isinstance(word, str) or word not in meanings:
        raise InputError(f"{where}: expected {name} {' or '.join(meanings)}, found {word!r:.60}")
    return meanings[word]


def require_setting(where: object, settings: Json, name: str, needed: Any, own_default: Any) -> None:
    """InputError where a setting, or its default where it is missing, is not what is computed here."""
    value = settings.get(name, own_default)
    if not is_same(value, needed):
        absent = "" if name in settings else " (it is missing, and diffusers takes this)"
        raise InputError(f"{where}: expected {name} {needed!r}, found {value!r:.60}{absent}")
