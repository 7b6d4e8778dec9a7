"""`sdxl-ref train --full --sharded`: the run of one process, shared; its state, its memory, its errors."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_data import CONFIGS
from training_runs import command, launch_torchrun, output_of, save_model, start, start_two, state
from training_shards import STOP_AT, facts_of, sharded_state, sharded_step, watched_command

from sdxl_ref.cli import main
from sdxl_ref.commands.train import check_sharded
from sdxl_ref.config import InputError
from sdxl_ref.training import finetune
from sdxl_ref.training.results import CHECKPOINT
from sdxl_ref.training.shard_plan import MemoryPlan, memory_plan
from sdxl_ref.training.state import SHARDS, SHARDS_FACTS, STATE
from sdxl_ref.weights.folder_saving import MOVED_AWAY
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.saving import temporary_name

SAME = 1e-6  # relative, in float64: the loss is in float32, and sums are in another order
ROUNDING = 1.1  # of the plain run's own rounding error
NEAR = 0.1  # of what a process holds: rows do not divide evenly
PATIENCE = 240  # seconds, for what takes a few
FULL = ["--full", "--dtype", "float64", "--learning-rate", "0.001"]


def assert_planned(facts: dict[str, int], plan: MemoryPlan) -> None:
    """What a process held is what was planned; and it never had the UNet whole."""
    assert "loaded unet" not in facts
    for name in ("weights", "gradients", "moments", "averaged", "gathered"):
        print(f"{name}: planned {getattr(plan, name):,}, measured {facts[name]:,}")
        assert facts[name] == pytest.approx(getattr(plan, name), rel=NEAR)


def wait_for(path: Path, older: int, processes: list[BaseProcess]) -> int:
    """Until a path has changed, or the run is over; the time of its change."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(FileNotFoundError):  # while names are exchanged
            if (changed := path.stat().st_ctime_ns) != older:
                return changed
        if not any(process.is_alive() for process in processes):
            return older
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run in this process be told to stop in the last of so many steps."""
    calls = 0
    step_loss = finetune.FineTuning.__call__

    def stopping(self: finetune.FineTuning, step: int, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_loss(self, step, generator)

    monkeypatch.setattr(finetune.FineTuning, "__call__", stopping)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Each kind of tensors (weights, moments, …) as one vector: single gradients are 0 but for rounding."""
    assert ours.keys() == theirs.keys()
    for kind in sorted({key.split(".")[0] for key in theirs}):
        keys = [key for key in theirs if key.split(".")[0] == kind]
        vectors = [torch.cat([tensors[key].flatten() for key in keys]) for tensors in (ours, theirs)]
        distance = peers.distance(*vectors)
        print(f"distance of {kind}: {distance:.1e}")
        assert distance <= SAME


def test_two_processes_by_torchrun_do_what_one_does(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """After one step the first moment is a tenth of the gradient."""
    words = [*FULL, "--steps", "1", "--accumulate", "2"]
    torchrun = launch_torchrun(command(refiner_file, pictures, tmp_path / "two", *words, "--sharded"))
    assert main(command(refiner_file, pictures, tmp_path / "one", *words, "--batch-size", "2")) == 0
    output, errors = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, errors
    assert output.count("memory of each of 2 processes: ") == 1
    assert output.count("plan: 1 steps of 4 pictures") == 1
    assert_same(sharded_state(tmp_path / "two"), state(tmp_path / "one"))
    assert_same(load_file(tmp_path / "two" / CHECKPOINT), load_file(tmp_path / "one" / CHECKPOINT))
    assert open_checkpoint(tmp_path / "two" / CHECKPOINT).config == CONFIGS["refiner"]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "options"), [("refiner", ["--gradient-checkpointing"]), ("base", [])], ids=["refiner", "base"]
)
def test_twenty_steps_in_two_shards(
    kind: str, options: list[str], request: pytest.FixtureRequest, pictures: Path, tmp_path: Path
) -> None:
    """State and result are those of one process; each holds its share, and the first one encodes for both."""
    file = request.getfixturevalue(f"{kind}_file")
    words = [*FULL, *options, "--steps", "20", "--accumulate", "2", "--ema", "0.5"]
    assert main(command(file, pictures, tmp_path / "one", *words, "--batch-size", "2")) == 0
    shared = command(file, pictures, tmp_path / "two", *words, "--sharded")
    output, statuses = output_of(start_two(shared, tmp_path / "printed", watched_command), tmp_path / "printed")
    assert statuses == [0, 0], output
    assert_same(sharded_state(tmp_path / "two"), state(tmp_path / "one"))
    assert_same(load_file(tmp_path / "two" / CHECKPOINT), load_file(tmp_path / "one" / CHECKPOINT))
    ranks = facts_of(tmp_path / "printed")
    assert [facts.get("pictures", 0) for facts in ranks] == [4, 0]
    assert [facts.get("captions", 0) for facts in ranks] == [5, 0]  # with the empty one
    plan = memory_plan(CONFIGS[kind], 2, torch.float64, has_average=True)
    for facts in ranks:
        assert_planned(facts, plan)
    assert f"{plan.line()}\n" in output


def test_one_process_holds_what_is_planned_for_it(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    words = command(refiner_file, pictures, tmp_path / "out", "--full", "--sharded", "--steps", "2", "--ema", "0.5")
    alone = start(words, tmp_path / "0.txt", watched_command, RANK="0")
    output, statuses = output_of([alone], tmp_path)
    assert statuses == [0], output
    [facts] = facts_of(tmp_path)
    assert_planned(facts, memory_plan(CONFIGS["refiner"], 1, torch.float32, has_average=True))


@pytest.mark.sweep
def test_one_shard_is_the_plain_run(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """In float32: one step, whose gradients are the same but for the rounding of the norm that clips them."""
    words = ["--full", "--steps", "1"]
    assert main(command(refiner_file, pictures, tmp_path / "plain", *words)) == 0
    assert main(command(refiner_file, pictures, tmp_path / "sharded", *words, "--sharded")) == 0
    assert_same(sharded_state(tmp_path / "sharded"), state(tmp_path / "plain"))


@pytest.mark.sweep
def test_autocast_is_as_near_to_float32_as_in_the_plain_run(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """Other parts are computed again in the backward pass, so that bfloat16 rounds other sums."""
    words = ["--full", "--steps", "1", "--gradient-checkpointing"]
    runs = {"float32": [], "plain": ["--autocast"], "sharded": ["--autocast", "--sharded"]}
    gradients = {}
    for name, options in runs.items():
        assert main(command(refiner_file, pictures, tmp_path / name, *words, *options)) == 0
        moments = sharded_state(tmp_path / name) if name == "sharded" else state(tmp_path / name)
        gradients[name] = torch.cat([moments[key].flatten() for key in sorted(moments) if key.startswith("exp_avg.")])
    plain, ours = (peers.distance(gradients[name], gradients["float32"]) for name in ("plain", "sharded"))
    print(f"distance to float32: plain {plain:.1e}, sharded {ours:.1e}")
    assert 0 < ours <= ROUNDING * plain


@pytest.mark.sweep
@pytest.mark.parametrize("first", [2, 1])
def test_a_run_goes_on_with_another_number_of_processes(
    first: int, refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """One of the processes is told to stop: all do, after the same step; the rest is done by more, or by fewer."""
    words = [*FULL, "--sharded", "--steps", "4", "--ema", "0.5"]
    whole = command(refiner_file, pictures, tmp_path / "whole", *words, "--batch-size", "2")
    assert main(whole) == 0
    alone = command(refiner_file, pictures, tmp_path / "out", *words, "--batch-size", "2")
    shared = command(refiner_file, pictures, tmp_path / "out", *words, "--batch-size", "1")
    printed = tmp_path / "printed"
    printed.mkdir()
    stop = {STOP_AT: "2"}
    if first == 2:
        output, statuses = output_of(start_two(shared, printed, watched_command, **stop), printed)
        assert statuses == [1, 1], output
    else:
        output, statuses = output_of([start(alone, printed / "0.txt", watched_command, RANK="1", **stop)], printed)
        assert statuses == [1], output
    assert sharded_step(tmp_path / "out") == 2
    assert not (tmp_path / "out" / CHECKPOINT).exists()
    if first == 2:
        assert main(alone) == 0
    else:
        output, statuses = output_of(start_two(shared, printed), printed)
        assert statuses == [0, 0], output
        assert "going on from step 2" in output
    assert_same(sharded_state(tmp_path / "out"), sharded_state(tmp_path / "whole"))
    assert_same(load_file(tmp_path / "out" / CHECKPOINT), load_file(tmp_path / "whole" / CHECKPOINT))


def test_another_device_than_can_be_shared_is_refused() -> None:
    with pytest.raises(InputError, match="expected --device cpu or cuda with --sharded, found mps"):
        check_sharded(torch.device("mps"))


BAD_OPTIONS = {
    "a LoRA": ([], "--sharded is of --full"),
    "a LoRA's rank": (["--full", "--rank", "4"], "--rank is a LoRA's: leave it out"),
    "text encoders": (["--full", "--text-encoders"], "--text-encoders is a LoRA's: leave it out"),
    "text encoders of a LoRA": (["--text-encoders"], "--sharded is of --full"),
    "autocast": (["--full", "--autocast"], "add --gradient-checkpointing, or leave --autocast out"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(
    case: str, refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = BAD_OPTIONS[case]
    assert main(command(refiner_file, pictures, tmp_path / "out", "--sharded", *options)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_state_of_another_run_or_a_damaged_one_is_refused(
    refiner_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(refiner_file, pictures, tmp_path, "--full", "--steps", "1")
    sharded = [*words, "--sharded"]
    assert main(sharded) == 0
    files = {path: path.read_bytes() for path in (tmp_path / SHARDS).iterdir()}
    capsys.readouterr()

    def refused(words: list[str]) -> str:
        assert main(words) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdxl-ref: error: ")]
        return line

    assert "another settings: learning_rate (1e-05), expected 0.5" in refused([*sharded, "--learning-rate", "0.5"])
    assert "another pictures of a step (1), expected 2" in refused([*sharded, "--batch-size", "2"])
    assert "holds a run with --sharded: go on with the same, or use another folder" in refused(words)
    [shard] = [path for path in files if path.suffix == ".safetensors"]
    assert files == {path: path.read_bytes() for path in (tmp_path / SHARDS).iterdir()}
    shard.write_bytes(files[shard][:-1000])
    assert "is no state of a run, or a damaged one" in refused(sharded)
    shard.unlink()
    assert f"or a damaged one (it has no {shard.name}): delete it to start over" in refused(sharded)
    shard.write_bytes(files[shard])
    (tmp_path / SHARDS / SHARDS_FACTS).write_text('{"step": "1"')
    assert "is no state of a run, or a damaged one" in refused(sharded)
    shutil.rmtree(tmp_path / SHARDS)
    (tmp_path / STATE).write_bytes(b"")
    assert "holds a run without --sharded: go on with the same, or use another folder" in refused(sharded)


@pytest.mark.sweep
def test_a_full_disk_leaves_the_last_state(
    refiner_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(refiner_file, pictures, tmp_path, "--full", "--sharded", "--steps", "3", "--save-every", "1")
    stop_after(2, monkeypatch)
    assert main(words) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / SHARDS).iterdir()}
    monkeypatch.undo()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)  # by torch.distributed.checkpoint
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"could not write {tmp_path / SHARDS}: No space left on device" in error
    assert "Traceback" not in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / SHARDS).iterdir()}
    assert not list(tmp_path.glob(".sdxl-ref*"))


@pytest.mark.sweep
def test_a_state_that_a_kill_left_without_its_name_is_put_back(
    refiner_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where a disk cannot exchange two names, the old folder is moved away for a moment."""
    words = command(refiner_file, pictures, tmp_path, "--full", "--sharded", "--steps", "3")
    stop_after(2, monkeypatch)
    assert main(words) == 1
    monkeypatch.undo()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    moved_away = tmp_path / temporary_name(ended.pid) / MOVED_AWAY
    moved_away.mkdir(parents=True)
    (tmp_path / SHARDS).rename(moved_away / SHARDS)
    assert main(words) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert sharded_step(tmp_path) == 3


@pytest.mark.sweep
def test_a_kill_at_any_moment_leaves_the_last_whole_state(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """SIGKILL of both processes while they save after each step: they go on, and end as one that is not disturbed."""
    kills = 6
    options = [*FULL, "--sharded", "--steps", str(4 * kills), "--save-every", "1"]
    words = command(refiner_file, pictures, tmp_path / "killed", *options)
    rng = np.random.default_rng(0)
    steps = []
    for i in range(kills):
        both = start_two(words, tmp_path / f"printed{i}")
        changed = 0
        for _ in range(rng.integers(2, 4)):
            changed = wait_for(tmp_path / "killed" / SHARDS, changed, both)
        time.sleep(float(rng.uniform(0, 0.2)))  # from one state to the next
        for process in both:
            process.kill()
            process.join()
        steps.append(sharded_step(tmp_path / "killed"))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in sharded_state(tmp_path / "killed").values())
    print(f"killed after steps {steps}")
    assert steps == sorted(steps)
    assert main([*words, "--batch-size", "2"]) == 0
    assert main(command(refiner_file, pictures, tmp_path / "whole", *options, "--batch-size", "2")) == 0
    assert_same(sharded_state(tmp_path / "killed"), sharded_state(tmp_path / "whole"))
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.sweep
def test_a_result_that_does_not_fit_is_told_once(pictures: Path, tmp_path: Path) -> None:
    """Neither process waits for the other one."""
    source = save_model(tmp_path / "half.safetensors", dtype=torch.float16)
    options = ["--full", "--sharded", "--steps", "1", "--learning-rate", "1e6", "--weight-decay", "0"]
    both = start_two(command(source, pictures, tmp_path / "out", *options), tmp_path / "printed")
    output, statuses = output_of(both, tmp_path / "printed")
    assert statuses == [2, 2], output
    [line] = [line for line in output.splitlines() if line.startswith("sdxl-ref: ")]
    assert "does not fit into torch.float16, the source's" in line
    assert sharded_step(tmp_path / "out") == 1
    assert not (tmp_path / "out" / CHECKPOINT).exists()


@pytest.mark.sweep
def test_a_lost_process_is_told_in_one_line(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    words = command(refiner_file, pictures, tmp_path, "--full", "--sharded", "--steps", "500", "--save-every", "2")
    both = start_two(words, tmp_path / "printed")
    changed = 0
    for _ in range(2):
        changed = wait_for(tmp_path / SHARDS, changed, both)
    both[1].kill()
    output, statuses = output_of(both, tmp_path / "printed")
    assert statuses[0] == 1
    [line] = [line for line in output.splitlines() if line.startswith("sdxl-ref: ")]
    assert "another process of this run ended; start it again with the same command" in line
    assert "Traceback" not in output
    assert 0 < sharded_step(tmp_path) < 500
