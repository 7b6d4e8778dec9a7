"""Samplers step by step against diffusers' schedulers, and the registry."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from peers import distance
from sampling import CONTRACT, STEP, Recorder, noise, seeded

from sdxl_ref.diffusion import solvers
from sdxl_ref.diffusion.samplers import SAMPLERS, Samplers, euler

SPACINGS = ("leading", "trailing", "linspace")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers


def peer(cls: Any, spacing: str, **options: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = cls(**betas, steps_offset=1, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_steps_are_those_of_diffusers(spacing: str) -> None:
    scheduler, record = peer(EulerDiscreteScheduler, spacing), Recorder()
    x = noise(2, 4, 8, 8) * scheduler.init_noise_sigma
    steps = list(SAMPLERS["euler"](record, x, scheduler.sigmas))
    assert len(steps) == 20
    for t, before, sigma, step in zip(scheduler.timesteps, record.x, scheduler.sigmas, steps, strict=False):
        scheduler.scale_model_input(before, t)
        theirs = scheduler.step((before - step.denoised) / sigma, t, before)
        assert distance(step.x, theirs.prev_sample) <= STEP, t


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_steps_are_those_of_diffusers(spacing: str) -> None:
    """The peer works at unit variance, on x / sqrt(1 + sigma^2)."""
    scheduler, record = peer(DDPMScheduler, spacing, clip_sample=False), Recorder()
    previous = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    alphas = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps]
    levels = [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]
    assert previous == [*scheduler.timesteps[1:].tolist(), -1]
    sigmas = torch.stack([*levels, torch.tensor(0.0)])

    steps = list(SAMPLERS["ddpm"](record, noise(2, 4, 8, 8) * 14.6, sigmas, generator=seeded()))
    assert len(steps) == 20
    generator = seeded()
    for i, (t, before, step) in enumerate(zip(scheduler.timesteps, record.x, steps, strict=True)):
        eps = (before - step.denoised) / sigmas[i]
        sample = before / torch.sqrt(1 + sigmas[i] ** 2)
        theirs = scheduler.step(eps, t, sample, generator=generator)
        assert distance(step.x, theirs.prev_sample * torch.sqrt(1 + sigmas[i + 1] ** 2)) <= STEP, t


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # those whose previous level the peer finds
def test_ddim_steps_are_those_of_diffusers(spacing: str, eta: float) -> None:
    """The peer works at unit variance, on x / sqrt(1 + sigma^2)."""
    scheduler, record = peer(DDIMScheduler, spacing, clip_sample=False), Recorder()
    alphas = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps]
    sigmas = torch.stack([*(((1 - alpha) / alpha) ** 0.5 for alpha in alphas), torch.tensor(0.0)])
    steps = list(SAMPLERS["ddim"](record, noise(2, 4, 8, 8) * 14.6, sigmas, generator=seeded(), eta=eta))
    generator = seeded()
    for i, (t, before, step) in enumerate(zip(scheduler.timesteps, record.x, steps, strict=True)):
        eps = (before - step.denoised) / sigmas[i]
        sample = before / torch.sqrt(1 + sigmas[i] ** 2)
        theirs = scheduler.step(eps, t, sample, eta=eta, generator=generator)
        assert distance(step.x, theirs.prev_sample * torch.sqrt(1 + sigmas[i + 1] ** 2)) <= STEP, t


# The registry


def test_the_names_and_their_order() -> None:
    files = {path.stem for path in Path(solvers.__path__[0]).glob("*.py")} - {"__init__"}
    assert list(SAMPLERS) == ["euler", *sorted(files)]  # at hand, then the files, sorted
    assert len(SAMPLERS) == len(files) + 1
    assert set(SAMPLERS) >= CONTRACT.keys()


@pytest.mark.parametrize("name", ["", "no_such_sampler", "solvers", "__init__", "lms.lms", "Euler", None, 3])
def test_an_unknown_name_is_a_key_error(name: Any) -> None:
    assert name not in SAMPLERS
    with pytest.raises(KeyError):
        SAMPLERS[name]


NAMES_ONLY = """
import sys
from sdxl_ref.diffusion.samplers import SAMPLERS
assert "lms" in SAMPLERS and len(SAMPLERS) == len(list(SAMPLERS)) and "lms" in SAMPLERS.keys()
SAMPLERS["euler"]
print([name for name in sys.modules if "diffusion.solvers" in name])
SAMPLERS["lms"]
print([name for name in sys.modules if "diffusion.solvers." in name])
"""


def test_a_file_is_imported_when_its_sampler_is_asked_for() -> None:
    result = subprocess.run([sys.executable, "-c", NAMES_ONLY], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "['sdxl_ref.diffusion.solvers.lms']"]


NEW_FILE = """
from sdxl_ref.diffusion.steps import sampler

@sampler(stochastic=False, evaluations=0, paper="arXiv:0000.00000")
def stay(denoise, x, sigmas, *, generator=None):
    yield from ()
"""


def test_a_new_file_is_a_new_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "more_samplers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "stay.py").write_text(NEW_FILE)
    (package / "broken.py").write_text("1 / 0")
    (package / "notes.txt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    samplers = Samplers("more_samplers")
    assert list(samplers) == ["euler", "broken", "stay"]
    assert samplers["stay"].evaluations == 0
    assert samplers["euler"] is euler
    with pytest.raises(ZeroDivisionError):
        samplers["broken"]
