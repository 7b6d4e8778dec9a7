"""The folder of a run: its state, its log and its lock are not another run's, and never half written."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_loops import SETTINGS, module, train
from training_runs import SERVER, hold_lock

from sdxl_ref.config import InputError
from sdxl_ref.training.loop import Run
from sdxl_ref.training.state import LOG, STATE, locked
from sdxl_ref.weights.saving import temporary_name


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
    ours, others = SERVER.Pipe()
    process = SERVER.Process(target=hold_lock, args=(tmp_path, others))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == "held"
    with pytest.raises(InputError, match="another run is at work in"), locked(tmp_path):
        pass
    process.kill()  # and no trace of it is left that would have to be deleted
    process.join()
    with locked(tmp_path):
        pass


def test_only_own_leftovers_are_deleted(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = tmp_path / ".notes.part"
    left = tmp_path / temporary_name(ended.pid)
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
        Run(module()[:2], SETTINGS, tmp_path, {"model": "a small one"})
    with pytest.raises(InputError, match="nothing to train"):
        Run(module().requires_grad_(False), SETTINGS, tmp_path, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_ref.weights.file_saving.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {STATE, LOG}


def test_identity_is_json(tmp_path: Path) -> None:
    run = train(tmp_path, stop=1)
    assert json.loads(json.dumps(run.identity)) == run.identity
