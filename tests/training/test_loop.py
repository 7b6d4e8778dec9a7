"""The training loop: what a step does, its log, stopping and resuming, and the refusal of what is not finite."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_loops import SETTINGS, module, train

from sdxl_ref.config import InputError
from sdxl_ref.training.loop import Run
from sdxl_ref.training.state import LOG, STATE

FAR = 0.2  # from the averaged weights to the last ones: half of the farthest that 40 steps of 0.01 can go


def log_without_seconds(folder: Path) -> list[list[str]]:
    return [row[:-1] for row in csv.reader((folder / LOG).open())]


def test_the_loss_falls_and_the_log_tells_of_it(tmp_path: Path) -> None:
    train(tmp_path, settings=replace(SETTINGS, steps=300))
    rows = list(csv.DictReader((tmp_path / LOG).open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 301))
    assert float(rows[-1]["loss"]) < 0.2 * float(rows[0]["loss"])
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] == pytest.approx(1e-2 / 3, rel=1e-3)
    assert max(rates) == 1e-2
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("autocast", ["", "bfloat16"])
def test_stopped_and_gone_on_equals_undisturbed_bit_for_bit(tmp_path: Path, autocast: str) -> None:
    settings = replace(SETTINGS, autocast=autocast)
    train(tmp_path / "whole", settings=settings)
    for stop in (4, 9, None):
        train(tmp_path / "parts", stop, settings)
    whole = load_file(tmp_path / "whole" / STATE)
    parts = load_file(tmp_path / "parts" / STATE)
    assert whole.keys() == parts.keys()
    assert {key.split(".")[0] for key in whole} == {"weights", "averaged", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert log_without_seconds(tmp_path / "whole") == log_without_seconds(tmp_path / "parts")


def test_a_kill_between_two_saves_costs_the_steps_since_and_nothing_else(tmp_path: Path) -> None:
    """The state of step 5 is there, the log went on to 8: what is computed again is not logged twice."""
    train(tmp_path / "whole")
    train(tmp_path / "killed", stop=5)
    state = (tmp_path / "killed" / STATE).read_bytes()
    train(tmp_path / "killed", stop=8)
    (tmp_path / "killed" / STATE).write_bytes(state)
    train(tmp_path / "killed")
    whole = load_file(tmp_path / "whole" / STATE)
    killed = load_file(tmp_path / "killed" / STATE)
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert [int(row["step"]) for row in csv.DictReader((tmp_path / "killed" / LOG).open())] == list(range(1, 13))


def test_an_error_in_the_loss_saves_what_was_reached(tmp_path: Path) -> None:
    net = module()

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        return net(torch.full((1, 8), torch.nan if step == 3 else 1.0)).sum()

    run = Run(net, SETTINGS, tmp_path, {})
    with pytest.raises(InputError, match="loss is nan at step 3: use a lower learning rate"):
        list(run.train(step_loss))
    at_once = Run(module(), SETTINGS, tmp_path / "other", {})
    with pytest.raises(InputError, match="loss is nan at step 0: no step was made yet"):
        list(at_once.train(lambda step, generator: step_loss(3, generator)))
    assert Run(module(), SETTINGS, tmp_path, {}).step == 3


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    """The loss is 0, its gradient infinite: what was reached before stays."""
    net = module()

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        out = net(torch.ones(1, 8)).sum()
        return (out - out.detach()).abs().sqrt() if step == 3 else out

    run = Run(net, SETTINGS, tmp_path, {})
    with pytest.raises(InputError, match=r"gradients' norm is (nan|inf) at step 3: use a lower"):
        list(run.train(step_loss, save_every=1))
    assert Run(module(), SETTINGS, tmp_path, {}).step == 3
    assert all(t.isfinite().all() for t in load_file(tmp_path / STATE).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a number from 1 to 1e9, found 0"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"warm_up": -5}, "warm up must be a number from 0 to 1e9, found -5"),
        ({"learning_rate": float("nan")}, "learning rate must be .*found nan"),
        ({"learning_rate": float("inf")}, "learning rate must be .*found inf"),
        ({"learning_rate": 1e38}, "learning rate must be .*found 1e[+]38"),
        ({"weight_decay": -1.0}, "weight decay must be .*found -1"),
        ({"ema": 1.0}, "averaged weights must be at least 0 and below 1, found 1"),
        ({"ema": float("nan")}, "averaged weights must be .*found nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **settings)


def test_any_seed_is_one(tmp_path: Path) -> None:
    train(tmp_path, settings=replace(SETTINGS, seed=2**64 - 1), stop=1)


def test_averages_of_bfloat16_weights_move(tmp_path: Path) -> None:
    """They are kept in float32: in bfloat16 a share of 0.001 of a small change is lost."""
    net = module().to(torch.bfloat16)
    run = Run(net, replace(SETTINGS, ema=0.999), tmp_path, {})
    assert {t.dtype for t in run.averaged.values()} == {torch.float32}
    before = {name: t.clone() for name, t in run.averaged.items()}
    list(run.train(lambda step, generator: net(torch.ones(1, 8, dtype=torch.bfloat16)).sum()))
    assert all(not torch.equal(before[name], t) for name, t in run.averaged.items())


def test_averaged_weights_follow_slowly(tmp_path: Path) -> None:
    run = train(tmp_path, settings=replace(SETTINGS, steps=40, ema=0.9))
    for name, p in run.weights.items():
        assert not torch.equal(run.averaged[name], p)
        assert (run.averaged[name] - p).abs().max() < 0.2
