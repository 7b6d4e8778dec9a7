"""What every sampler promises, read from `SAMPLERS`: it holds for a new file in `solvers` too."""

import inspect
import re

import pytest
import torch
from peers import distance
from sampling import CONTRACT, SIGMAS, STEP, STOCHASTIC, Recorder, denoise, draws, every, noise, run, seeded

from sdxl_ref.diffusion.samplers import SAMPLERS


@every
def test_a_sampler_is_a_described_function(name: str) -> None:
    function = SAMPLERS[name]
    assert function.__name__ == name
    assert inspect.isfunction(function)
    assert len(function.__doc__ or "") > 100
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", function.paper)
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[:4]] == ["denoise", "x", "sigmas", "generator"]
    for option in parameters[3:]:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
        assert option.name == "generator" or option.name in (function.__doc__ or ""), f"{option.name}: not described"
    if name in CONTRACT:
        assert (function.stochastic, function.evaluations) == CONTRACT[name]


@every
def test_the_flag_says_whether_noise_is_drawn(name: str) -> None:
    """At each step but the one that ends at 0."""
    steps = len(SIGMAS) - 1
    assert draws(name, SIGMAS) == (steps - 1 if SAMPLERS[name].stochastic else 0)
    assert draws(name, SIGMAS[:-1]) == (steps - 1 if SAMPLERS[name].stochastic else 0)


@every
def test_a_step_carries_the_level_after_it(name: str) -> None:
    record = Recorder()
    steps = run(name, record, noise(1, 4, 8, 8) * SIGMAS[0], SIGMAS)
    assert torch.equal(torch.stack([step.sigma for step in steps]), SIGMAS[1:])
    evaluations = SAMPLERS[name].evaluations
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
    assert evaluations == [count * SAMPLERS[name].evaluations for count in range(3)]


@every
def test_writing_into_x_steers_the_run(name: str) -> None:
    record = Recorder()
    for i, step in enumerate(SAMPLERS[name](record, noise(1, 4, 8, 8), SIGMAS, generator=seeded())):
        if i == 2:
            step.x.fill_(0.25)
    start = 3 * SAMPLERS[name].evaluations  # the first evaluation of the fourth step
    assert torch.equal(record.x[start], torch.full((1, 4, 8, 8), 0.25))
