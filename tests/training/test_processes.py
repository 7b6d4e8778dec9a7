"""Several processes, and processes that end: one that is lost, one that is killed while it saves, bad input."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import distributed
from training_runs import command, launch_torchrun, output_of, save_pictures, start, start_two, state, step_of

from sdxl_ref.cli import main
from sdxl_ref.commands import train
from sdxl_ref.config import InputError
from sdxl_ref.training.processes import Process, process_group, replacing_folder_for_all
from sdxl_ref.training.state import LOG, STATE

BY_TORCHRUN = pytest.param("torchrun", marks=pytest.mark.sweep)
PATIENCE = 240  # seconds, for what takes a few


def wait_for(condition: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    """Until something has happened in a run that has not ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert is_running() or condition()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_a_new_state(path: Path, process: BaseProcess) -> None:
    """Until a run has saved once more, or has come to its end."""
    before = path.stat().st_mtime_ns if path.exists() else 0

    def is_new() -> bool:
        return path.exists() and path.stat().st_mtime_ns != before

    wait_for(lambda: is_new() or not process.is_alive(), process.is_alive)
    assert path.exists()


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


def told(text: str) -> list[str]:
    """The lines of errors that are meant for the user."""
    return [line for line in text.splitlines() if line.startswith("sdxl-ref: ")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("launch", ["processes", BY_TORCHRUN])
def test_a_dead_process_stops_the_run_which_goes_on_when_started_again(
    launch: str, refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    words = command(refiner_file, pictures, tmp_path, "--rank", "2", "--steps", "30", "--save-every", "2")

    def has_logged() -> bool:
        log = tmp_path / LOG
        return log.exists() and len(log.read_text().splitlines()) >= 5

    if launch == "torchrun":
        torchrun = launch_torchrun(words)
        wait_for(has_logged, lambda: torchrun.poll() is None)
        os.kill(max(children(torchrun.pid)), signal.SIGKILL)  # the second process
        _, output = torchrun.communicate(timeout=PATIENCE)
        assert torchrun.returncode != 0
    else:
        both = start_two(words, tmp_path / "printed")
        wait_for(has_logged, lambda: all(process.is_alive() for process in both))
        both[1].kill()
        output, statuses = output_of(both, tmp_path / "printed")
        assert statuses[0] == 1
    print(told(output))
    assert len(told(output)) == 1
    assert "start it again with the same command" in told(output)[0]
    assert 4 <= step_of(tmp_path) < 30
    assert main([*words, "--batch-size", "2"]) == 0  # one process with the batch of both
    assert (tmp_path / "lora_kohya.safetensors").exists()
    assert step_of(tmp_path) == 30


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.sweep)])
def test_a_kill_while_it_saves_leaves_the_old_state_whole(
    kills: int, refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """SIGKILL at several moments of a run that saves after each step: there is always a state, it is whole, and the
    run that goes on from it ends as an undisturbed one."""
    options = ["--rank", "32", "--layers", ".", "--steps", str(5 * kills), "--save-every", "1"]
    words = command(refiner_file, pictures, tmp_path / "killed", *options)
    path = tmp_path / "killed" / STATE
    rng = np.random.default_rng(0)
    steps = set()
    for _ in range(kills):
        alone = start(words, tmp_path / "printed.txt")
        for _ in range(rng.integers(1, 4)):
            wait_for_a_new_state(path, alone)
        time.sleep(float(rng.uniform(0, 0.1)))  # from the one to the next
        alone.kill()
        alone.join()
        steps.add(step_of(tmp_path / "killed"))
        with safe_open(path, framework="pt") as file:
            assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
    print(f"killed after steps {sorted(steps)}")
    assert len(steps) > 1
    assert main(words) == 0
    assert main(command(refiner_file, pictures, tmp_path / "whole", *options)) == 0
    one = state(tmp_path / "whole")
    other = state(tmp_path / "killed")
    assert all(torch.equal(one[key], other[key]) for key in one)
    files = [path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole").rglob("*"))]
    assert sorted((tmp_path / "killed").rglob("*")) == [  # nothing half written is left
        tmp_path / "killed" / file for file in files
    ]


@pytest.mark.parametrize("launch", [pytest.param("processes", marks=pytest.mark.sweep), "torchrun"])
def test_bad_input_is_told_once_by_two_processes(launch: str, refiner_file: Path, tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"broken")
    words = command(refiner_file, folder, tmp_path / "out")
    if launch == "torchrun":
        torchrun = launch_torchrun(words)
        _, output = torchrun.communicate(timeout=PATIENCE)
        assert torchrun.returncode != 0
    else:
        output, statuses = output_of(start_two(words, tmp_path / "printed"), tmp_path / "printed")
        assert statuses == [2, 2]
    [line] = told(output)
    assert "0.png" in line
    assert "--skip-bad" in line


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), SystemExit),
        (distributed.DistNetworkError("reset"), SystemExit),
    ],
)
def test_only_a_lost_process_is_told_as_one(
    error: Exception,
    raised: type[BaseException],
    refiner_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(train, "identity", fail)
    monkeypatch.setattr(train, "this_process", lambda: Process(0, 2))
    with pytest.raises(raised):
        main(command(refiner_file, pictures, tmp_path))


def test_half_of_torchruns_variables(
    refiner_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for count in ("2", ""):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert main(command(refiner_file, pictures, tmp_path)) == 2
        assert "expected torchrun's variables, found no RANK, LOCAL_RANK" in capsys.readouterr().err


def test_a_folder_that_not_all_processes_see_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_seen(answers: list[bool], own: bool) -> None:
        assert own
        answers[0] = False  # as one on another machine says

    with process_group(torch.device("cpu"), is_needed=True):
        with replacing_folder_for_all(tmp_path / "state") as beside:
            (beside / "rows").write_bytes(b"old")
        monkeypatch.setattr(distributed, "all_gather_object", not_seen)
        with (
            pytest.raises(InputError, match=r"expected .* on a disk that all processes share"),
            replacing_folder_for_all(tmp_path / "state"),
        ):
            raise AssertionError("nothing is to be written")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state" / "rows").read_bytes() == b"old"
