"""The training loop: resume, logs, refusals; and the loss against diffusers' UNet."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.saving import PREFIX
from sdxl_ref.training.loop import LOG, STATE, Run, Settings, locked

SETTINGS = Settings(steps=12, learning_rate=1e-2, warm_up=3, seed=5)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def train(folder: Path, stop: int | None = None, settings: Settings = SETTINGS, save_every: int = 5) -> Run:
    net = module()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 8, generator=generator)
        return ((net(x) - x.flip(1)) ** 2).mean()

    run = Run(net, settings, folder, {"model": "a small one"})
    for _ in run.train(loss_of, save_every, stop):
        pass
    return run


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
    whole, parts = (load_file(tmp_path / name / STATE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert {key.split(".")[0] for key in whole} == {"weights", "averaged", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [
        [row[:-1] for row in csv.reader((tmp_path / name / LOG).open())] for name in ("whole", "parts")
    ]  # all but the seconds
    assert logs[0] == logs[1]


def test_a_kill_between_two_saves_costs_the_steps_since_and_nothing_else(tmp_path: Path) -> None:
    """The state of step 5 is there, the log went on to 8: what is computed again is not logged twice."""
    train(tmp_path / "whole")
    train(tmp_path / "killed", stop=5)
    state = (tmp_path / "killed" / STATE).read_bytes()
    train(tmp_path / "killed", stop=8)
    (tmp_path / "killed" / STATE).write_bytes(state)
    train(tmp_path / "killed")
    whole, killed = (load_file(tmp_path / name / STATE) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert [int(row["step"]) for row in csv.DictReader((tmp_path / "killed" / LOG).open())] == list(range(1, 13))


def test_an_error_in_the_loss_saves_what_was_reached(tmp_path: Path) -> None:
    net = module()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return net(torch.full((1, 8), torch.nan if step == 3 else 1.0)).sum()

    run = Run(net, SETTINGS, tmp_path, {})
    with pytest.raises(InputError, match="loss is nan at step 3: use a lower learning rate"):
        list(run.train(loss_of))
    at_once = Run(module(), SETTINGS, tmp_path / "other", {})
    with pytest.raises(InputError, match="loss is nan at step 0: no step was made yet"):
        list(at_once.train(lambda step, generator: loss_of(3, generator)))
    assert Run(module(), SETTINGS, tmp_path, {}).step == 3


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    """The loss is 0, its gradient infinite: what was reached before stays."""
    net = module()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        out = net(torch.ones(1, 8)).sum()
        return (out - out.detach()).abs().sqrt() if step == 3 else out

    run = Run(net, SETTINGS, tmp_path, {})
    with pytest.raises(InputError, match=r"gradients' norm is (nan|inf) at step 3: use a lower"):
        list(run.train(loss_of, save_every=1))
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


@pytest.mark.parametrize("left", [b"", b"no state", None])
def test_a_damaged_state_or_log_is_told_in_one_line(left: bytes | None, tmp_path: Path) -> None:
    train(tmp_path, stop=2)
    path = tmp_path / STATE
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] if left is None else left)
    with pytest.raises(InputError, match=r"is no state of a run, or a damaged one .*delete it to start over"):
        train(tmp_path)
    path.write_bytes(whole)
    with (tmp_path / LOG).open("ab") as log:
        log.write(b"\n\nabc,1\n\xff\xff\n\xc2\xb2,1\n")  # opened in an editor; not UTF-8; a digit that is no number
    train(tmp_path)
    assert [int(row["step"]) for row in csv.DictReader((tmp_path / LOG).open())] == list(range(1, 13))


@pytest.mark.parametrize("identity", ["[]", "5", '{"settings": 1'])
def test_a_state_that_says_nothing_of_its_run_is_refused(identity: str, tmp_path: Path) -> None:
    save_file({"weights.a": torch.zeros(1)}, tmp_path / STATE, {"identity": identity, "step": "0"})
    with pytest.raises(InputError, match=r"is no state of a run|holds a run with another settings"):
        train(tmp_path)


def test_a_folder_is_a_runs_own_before_its_first_step(tmp_path: Path) -> None:
    Run(module(), SETTINGS, tmp_path, {"data": "mine"})
    with pytest.raises(InputError, match="a run with another data"):
        Run(module(), SETTINGS, tmp_path, {"data": "yours"})


def test_the_log_is_never_half_written_nor_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while rows are cut off: the log is what it was. A table of something else is not replaced."""
    train(tmp_path, stop=3)
    path = tmp_path / LOG
    with path.open("a") as log:
        log.write("4,1,1,1,1\n")
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"could not write .*log\.csv: No space left on device"):
            train(tmp_path)
    assert path.read_bytes() == before
    path.write_text("date,weight\n2020-01-01,70\n")
    with pytest.raises(InputError, match=r"expected a log of a run.* found 'date,weight'"):
        train(tmp_path)
    assert path.read_text() == "date,weight\n2020-01-01,70\n"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="could not read the log"):
        train(tmp_path)


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    hold = f"from pathlib import Path; from sdxl_ref.training.loop import locked\nwith locked(Path({str(tmp_path)!r})):"
    words = [sys.executable, "-c", f"{hold} print('held', flush=True); input()"]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another run is at work in"), locked(tmp_path):
        pass
    other.kill()  # and no trace of it is left that would have to be deleted
    other.wait()
    with locked(tmp_path):
        pass


def test_only_own_leftovers_are_deleted(tmp_path: Path) -> None:
    mine, left = tmp_path / ".notes.part", tmp_path / f"{PREFIX}abc.part"
    for folder in (mine, left, tmp_path / "deeper" / mine.name):
        folder.mkdir(parents=True)
    train(tmp_path, stop=1)
    assert mine.exists()
    assert (tmp_path / "deeper" / mine.name).exists()
    assert not left.exists()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, stop=2)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(InputError, match=r"another settings: learning_rate \(0\.\d+\), expected 0\.001: go on with"):
        train(tmp_path, settings=replace(SETTINGS, learning_rate=1e-3))
    with pytest.raises(InputError, match="another model"):
        Run(module(), SETTINGS, tmp_path, {"model": "a large one"})
    with pytest.raises(InputError, match="another model"):
        Run(module(), SETTINGS, tmp_path, {})
    with pytest.raises(InputError, match=r"of another model \(differs in 2\.bias"):
        Run(module()[:2], SETTINGS, tmp_path, {"model": "a small one"})  # type: ignore[index]
    with pytest.raises(InputError, match="nothing to train"):
        Run(module().requires_grad_(False), SETTINGS, tmp_path, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_ref.saving.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {STATE, LOG}


def test_averaged_weights_follow_slowly(tmp_path: Path) -> None:
    run = train(tmp_path, settings=replace(SETTINGS, steps=40, ema=0.9))
    for name, p in run.weights.items():
        assert not torch.equal(run.averaged[name], p)
        assert (run.averaged[name] - p).abs().max() < 0.2


def test_identity_is_json(tmp_path: Path) -> None:
    run = train(tmp_path, stop=1)
    assert json.loads(json.dumps(run.identity)) == run.identity
