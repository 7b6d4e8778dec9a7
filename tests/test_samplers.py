"""Samplers step by step against diffusers' schedulers, and what every sampler promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from peers import distance
from torch import Tensor

from sdxl_ref.diffusion.samplers import SAMPLERS, Step
from sdxl_ref.diffusion.schedule import NoiseSchedule

STEP = 5e-7  # relative L2 distance of one float32 step
SPACINGS = ("leading", "trailing", "linspace")
STOCHASTIC = {"ddpm", "euler_ancestral", "dpmpp_2s_ancestral"}
TWICE = {"heun", "dpmpp_2s_ancestral"}  # evaluations a step; but the last, which ends at 0
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear stand-in for a network, of operations that IEEE rounds alike in every position of a tensor."""
    return 0.7 * x / (1 + x * x) + 0.3 * x / (1 + sigma * sigma)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A denoiser that keeps what it was called with."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.x.append(x.clone())
        self.sigmas.append(sigma)
        return denoise(x, sigma)


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


every = pytest.mark.parametrize("name", sorted(SAMPLERS))


def run(name: str, network: Callable[..., Tensor], x: Tensor, sigmas: Tensor, generator: Any = None) -> list[Step]:
    needed = seeded() if generator is None and name in STOCHASTIC else generator
    return list(SAMPLERS[name](network, x, sigmas, generator=needed))


SIGMAS = NoiseSchedule().discretize(6)


@every
def test_a_step_carries_the_level_after_it(name: str) -> None:
    record = Recorder()
    steps = run(name, record, noise(1, 4, 8, 8) * SIGMAS[0], SIGMAS)
    assert torch.equal(torch.stack([step.sigma for step in steps]), SIGMAS[1:])
    evaluations = 2 if name in TWICE else 1
    assert len(record.x) == evaluations * (len(SIGMAS) - 2) + 1
    starts = range(0, len(record.x), evaluations)  # of the steps
    assert [float(record.sigmas[i]) for i in starts] == SIGMAS[:-1].tolist()
    for i, before, step in zip(starts, [None, *steps], steps, strict=False):
        assert torch.equal(step.denoised, denoise(record.x[i], record.sigmas[i]))
        assert before is None or torch.equal(before.x, record.x[i])


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lms"}))  # which goes on from earlier derivatives too
def test_the_last_step_ends_on_the_clean_estimate(name: str) -> None:
    last = run(name, denoise, noise(1, 4, 8, 8) * SIGMAS[0], SIGMAS)[-1]
    assert last.sigma == 0
    assert distance(last.x, last.denoised) <= STEP


@every
def test_a_run_may_stop_above_zero(name: str) -> None:
    whole = run(name, denoise, noise(1, 4, 8, 8) * SIGMAS[0], SIGMAS)
    part = run(name, denoise, noise(1, 4, 8, 8) * SIGMAS[0], SIGMAS[:4])
    assert [float(step.sigma) for step in part] == SIGMAS[1:4].tolist()
    assert torch.equal(part[-1].x, whole[2].x)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_denoiser_gets_0d_float32_levels(name: str, dtype: torch.dtype) -> None:
    record = Recorder()
    run(name, record, noise(1, 4, 8, 8), SIGMAS.to(dtype))
    run(name, record, noise(1, 4, 8, 8).to(dtype), SIGMAS)
    assert all(sigma.shape == () and sigma.dtype == torch.float32 for sigma in record.sigmas)


@every
def test_x_keeps_its_dtype(name: str) -> None:
    for step in run(name, denoise, noise(1, 4, 8, 8).double() * 10, SIGMAS):
        assert step.x.dtype == step.denoised.dtype == torch.float64


def test_levels_move_to_the_device_of_x() -> None:
    """Not the samplers that look at a level's value, which the meta device has not."""
    record = Recorder()
    list(SAMPLERS["euler"](record, noise(1, 4, 8, 8).to("meta"), SIGMAS))
    assert all(sigma.device.type == "meta" and sigma.shape == () for sigma in record.sigmas)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_on_a_gpu_with_noise_from_the_cpu(name: str) -> None:
    x, record = noise(2, 4, 8, 8) * SIGMAS[0], Recorder()
    here, there = run(name, denoise, x, SIGMAS), run(name, record, x.cuda(), SIGMAS)
    assert all(sigma.device.type == "cuda" and sigma.dtype == torch.float32 for sigma in record.sigmas)
    assert distance(there[-1].x.cpu(), here[-1].x) <= 10 * STEP


@every
def test_a_list_of_generators_draws_one_image_each(name: str) -> None:
    x, seeds = noise(3, 4, 8, 8) * SIGMAS[0], (11, 12, 13)
    together = run(name, denoise, x, SIGMAS, [seeded(seed) for seed in seeds])
    for i, seed in enumerate(seeds):
        for generator in ([seeded(seed)], seeded(seed)):
            alone = run(name, denoise, x[i : i + 1], SIGMAS, generator)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a.x[0], b.x[i])


def test_one_generator_draws_the_whole_batch_at_once() -> None:
    x = noise(2, 4, 8, 8) * SIGMAS[0]
    [first, *_] = run("ddpm", denoise, x, SIGMAS, seeded(3))
    drawn = torch.randn(x.shape, generator=seeded(3))
    [bare, *_] = run("ddpm", lambda x, _: torch.zeros_like(x), torch.zeros_like(x), SIGMAS, seeded(3))
    assert distance(bare.x / bare.x.std(), drawn / drawn.std()) <= STEP
    assert not torch.equal(first.x, bare.x)


def test_ddpm_draws_at_each_step_but_the_last() -> None:
    generator, expected = seeded(5), seeded(5)
    run("ddpm", denoise, noise(1, 4, 8, 8), SIGMAS, generator)
    for _ in range(len(SIGMAS) - 2):
        torch.randn((1, 4, 8, 8), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_a_stochastic_sampler_needs_a_generator(name: str) -> None:
    record = Recorder()
    with pytest.raises(ValueError, match=r"draws noise at each step: hand in a torch\.Generator"):
        list(SAMPLERS[name](record, noise(1, 4, 8, 8), SIGMAS))
    assert len(record.x) <= 2  # in the first step


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_generators_as_images(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"one generator per image \(2\), found {count}"):
        run(name, denoise, noise(2, 4, 8, 8), SIGMAS, [seeded(i) for i in range(count)])


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - STOCHASTIC))
def test_a_deterministic_sampler_draws_nothing(name: str) -> None:
    x, generator = noise(1, 4, 8, 8) * SIGMAS[0], seeded(5)
    with_one, without = run(name, denoise, x, SIGMAS, generator), run(name, denoise, x, SIGMAS)
    assert torch.equal(generator.get_state(), seeded(5).get_state())
    assert torch.equal(with_one[-1].x, without[-1].x)


@every
def test_nothing_global_is_drawn(name: str) -> None:
    state = torch.get_rng_state()
    run(name, denoise, noise(1, 4, 8, 8), SIGMAS)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_x_is_not_written_to(name: str) -> None:
    x = noise(1, 4, 8, 8) * SIGMAS[0]
    before = x.clone()
    run(name, denoise, x, SIGMAS)
    assert torch.equal(x, before)


@every
def test_a_step_is_made_when_it_is_asked_for(name: str) -> None:
    record = Recorder()
    steps = SAMPLERS[name](record, noise(1, 4, 8, 8), SIGMAS, generator=seeded())
    evaluations = [len(record.x)]
    for _ in range(2):
        next(steps)
        evaluations.append(len(record.x))
    assert evaluations == ([0, 2, 4] if name in TWICE else [0, 1, 2])


@every
def test_writing_into_x_steers_the_run(name: str) -> None:
    record = Recorder()
    for i, step in enumerate(SAMPLERS[name](record, noise(1, 4, 8, 8), SIGMAS, generator=seeded())):
        if i == 2:
            step.x.fill_(0.25)
    start = 6 if name in TWICE else 3  # the first evaluation of the fourth step
    assert torch.equal(record.x[start], torch.full((1, 4, 8, 8), 0.25))
