"""Files and folders are replaced whole: errors, kills at every moment, links, rights, and what is left behind."""

import json
import multiprocessing
import os
import runpy
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_before
from PIL import Image
from safetensors import safe_open

from sdxl_ref.config import InputError
from sdxl_ref.weights import folder_saving, leftovers, saving
from sdxl_ref.weights.file_saving import write_tensors, write_text
from sdxl_ref.weights.folder_saving import replacing_folder
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.saving import PREFIX, SUFFIX, replacing, temporary_name

FOLDER = {"index": "1", "part/config": "2", "part/deeper/weights": "3"}


def write_folder(folder: Path, files: dict[str, str] = FOLDER) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def replace_folder(target: Path) -> None:
    with replacing_folder(target) as beside:
        write_folder(beside)


@pytest.fixture
def dead_process() -> int:
    """The number of a process that is no more."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_are_written_and_replaced(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    write_folder(tmp_path / "folder", {"index": "0", "gone": "0"})
    replace_folder(tmp_path / "folder")
    assert contents(tmp_path / "folder") == FOLDER
    assert names(tmp_path) == ["file", "folder"]


def test_the_old_one_stays_until_the_end_and_where_the_work_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def fail() -> None:
        with replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            assert (tmp_path / "file").read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_text(tmp_path / "real" / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["file"]


def test_a_name_may_have_255_bytes(tmp_path: Path) -> None:
    for name in ("x" * 255, "猫" * 85):
        replace_folder(tmp_path / name)
        replace_folder(tmp_path / name)
        assert names(tmp_path) == [name]
        shutil.rmtree(tmp_path / name)


def test_a_file_takes_no_folders_place_and_a_folder_no_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    write_text(tmp_path / "file", "old")
    with pytest.raises(InputError, match=r"could not write .*folder: Is a directory"):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(InputError, match=r"could not write .*file: Not a directory"):
        replace_folder(tmp_path / "file")
    assert contents(tmp_path / "folder") == FOLDER
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_usual_rights(mask: int, tmp_path: Path) -> None:
    """safetensors writes for the owner alone, whatever the mask."""
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "file", {"a": torch.zeros(1)}, {})
        with replacing_folder(tmp_path / "folder") as beside:
            beside.mkdir()
            write_tensors(beside / "file", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_the_mask_of_the_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of all threads: one that writes a file meanwhile would write it for everybody."""
    monkeypatch.setattr("os.umask", lambda _: pytest.fail("it was changed"))
    write_text(tmp_path / "file", "new")


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    write_text(tmp_path / "private", "text")
    (tmp_path / "private").chmod(0o600)
    with replacing(tmp_path / "folder") as beside:
        beside.mkdir()
        (beside / "link").symlink_to(tmp_path / "private")
        (beside / "nowhere").symlink_to(tmp_path / "none")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert names(tmp_path / "folder") == ["link", "nowhere"]


def test_all_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "folder").exists()))

    monkeypatch.setattr("os.fsync", fsync)
    replace_folder(tmp_path / "folder")
    written = [tmp_path / "folder", *(tmp_path / "folder").rglob("*")]
    assert {inode for inode, is_renamed in synced if not is_renamed} == {path.stat().st_ino for path in written}
    assert synced[-1] == (tmp_path.stat().st_ino, True)  # then the new name


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "file", "old")
    write_folder(tmp_path / "folder", {"index": "old"})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"could not write .*file: No space left on device"):
        write_text(tmp_path / "file", "new")
    with pytest.raises(InputError, match=r"could not write .*folder: No space left on device"):
        replace_folder(tmp_path / "folder")
    with pytest.raises(InputError, match=r"could not write .*none/file: No such file or directory"):
        write_text(tmp_path / "none" / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert contents(tmp_path / "folder") == {"index": "old"}
    assert names(tmp_path) == ["file", "folder"]


# --- many at once ---------------------------------------------------------------------------------------------------


def save_fifty(folder: Path, first: int) -> None:
    """Fifty pictures, and as many texts to one name that all write."""
    for number in range(first, first + 50):
        picture = Image.new("RGB", (8, 8), (number, 255 - number, 7))
        with replacing(folder / f"{number}.png") as beside:
            picture.save(beside, format="PNG")
        write_text(folder / "shared", str(number) * 100)


@pytest.mark.parametrize("worker", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_four_at_once_save_two_hundred_right_pictures(worker: Any, tmp_path: Path) -> None:
    """Each under its own name with its own content, and of the one that all write a whole one; nothing is left over."""
    workers = [worker(target=save_fifty, args=(tmp_path, 50 * i)) for i in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    colours = [Image.open(tmp_path / f"{number}.png").getpixel((0, 0)) for number in range(200)]
    assert colours == [(number, 255 - number, 7) for number in range(200)]
    text = (tmp_path / "shared").read_text()
    assert text in {str(number) * 100 for number in range(200)}
    assert len(names(tmp_path)) == 201


# --- kills ----------------------------------------------------------------------------------------------------------


def moments_of_a_kill(work: Callable[[], object], state: Callable[[], object], folder: Path) -> list[object]:
    """The state after a kill at each moment of the work, and a next run's `clear`, which leaves one name there."""
    states = []
    for call in count():
        is_killed = killed_before(work, call)
        clear(folder)
        assert names(folder) == ["target"]
        states.append(state())
        if not is_killed:
            return states


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_text(target, "old")
    states = moments_of_a_kill(lambda: write_text(target, "new"), target.read_text, tmp_path)
    assert states == sorted(states, reverse=True)  # first the old one, then the new
    assert set(states) == {"old", "new"}
    assert len(states) > 6


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged the old one is put back."""
    if not can_exchange:
        monkeypatch.setattr(folder_saving, "exchange", lambda *_: False)
    old = {"index": "0", "gone": "0"}
    target = tmp_path / "target"
    write_folder(target, old)
    states = moments_of_a_kill(lambda: replace_folder(target), lambda: contents(target), tmp_path)
    changes = [i for i, state in enumerate(states) if state == FOLDER]
    assert states == [old] * changes[0] + [FOLDER] * len(changes)
    assert len(states) > 12


# --- where names cannot be exchanged ----------------------------------------------------------------------------------


def test_two_steps_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_call(*_: object, **__: object) -> object:
        return object()

    monkeypatch.setattr("ctypes.CDLL", no_such_call)
    write_folder(tmp_path / "folder", {"index": "old"})
    replace_folder(tmp_path / "folder")
    assert contents(tmp_path / "folder") == FOLDER
    assert names(tmp_path) == ["folder"]


def test_the_old_folder_comes_back_where_the_second_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    write_folder(tmp_path / "folder", {"index": "old"})
    monkeypatch.setattr(folder_saving, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="Input/output error"):
        replace_folder(tmp_path / "folder")
    assert contents(tmp_path / "folder") == {"index": "old"}
    assert names(tmp_path) == ["folder"]


def test_no_folder_is_put_back_over_another(tmp_path: Path, dead_process: int) -> None:
    """It was killed while it deleted the old one."""
    write_folder(tmp_path / "folder", {"index": "new"})
    moved_away = tmp_path / temporary_name(dead_process) / folder_saving.MOVED_AWAY
    write_folder(moved_away / "folder", {"index": "half of the old"})
    clear(tmp_path)
    assert contents(tmp_path) == {"folder/index": "new"}
    assert names(tmp_path) == ["folder"]


# --- what is left behind --------------------------------------------------------------------------------------------


def test_only_what_dead_processes_of_this_machine_left_is_deleted(
    tmp_path: Path, dead_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [temporary_name(dead_process)]
    kept = [temporary_name(os.getpid()), temporary_name(os.getppid())]
    kept += [f"{PREFIX}notes{SUFFIX}", f".notes{SUFFIX}", f"{PREFIX}a-b-c{SUFFIX}"]
    monkeypatch.setattr(saving, "MACHINE", "elsewhere")
    kept.append(temporary_name(dead_process))
    monkeypatch.undo()
    for name in (*left, *kept):
        write_folder(tmp_path / name)
        write_folder(tmp_path / "deeper" / name)
    clear(tmp_path)
    assert names(tmp_path) == sorted([*kept, "deeper"])
    assert names(tmp_path / "deeper") == sorted([*left, *kept])
    clear(tmp_path / "none")


def aged(folder: Path, seconds: float) -> Path:
    """A temporary folder in which nothing has changed for so long."""
    write_folder(folder)
    past = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (past, past))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell when a process began")
@pytest.mark.parametrize("of_ours", [True, False], ids=["our own number", "another's"])
def test_a_number_is_given_again_after_a_restart(of_ours: bool, tmp_path: Path) -> None:
    """The process of a leftover's number runs, but began after the leftover's last change."""
    process = os.getpid() if of_ours else os.getppid()
    age = leftovers.process_age(process)
    assert age is not None
    assert age >= 0
    left = aged(tmp_path / temporary_name(process), age + 60)
    used = aged(tmp_path / temporary_name(process), age / 2)
    clear(tmp_path)
    assert not left.exists()
    assert used.exists()


def test_other_containers_of_a_machine_are_left_a_day(
    tmp_path: Path, dead_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processes have numbers of their own: none of ours says whether they live. Other machines stay alone."""
    monkeypatch.setattr(leftovers, "MACHINE", "node_4026531836_0123abcd")
    names = {}
    for machine in ("node_4026532999_0123abcd", "node_4026531836_9999ffff", "node_4026531836", "node"):
        monkeypatch.setattr(saving, "MACHINE", machine)
        for days in (0.9, 1.1):
            names[machine, days] = aged(tmp_path / temporary_name(dead_process), days * 86400)
    clear(tmp_path)
    left = [key for key, folder in names.items() if not folder.exists()]
    assert left == [("node_4026532999_0123abcd", 1.1)]


def test_what_this_process_writes_is_not_deleted(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as beside:
        beside.write_text("new")
        clear(tmp_path)
        replace_folder(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("host", ["", "a-b/c*[d]", "x" * 253, "猫"])
def test_any_name_of_a_machine_is_told_apart(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    there: Any = runpy.run_path(saving.__file__)
    name = there["temporary_name"](123)
    fields = leftovers.TEMPORARY.fullmatch(name)
    assert fields is not None
    assert fields["process"] == "123"
    assert fields["machine"] == there["MACHINE"] != saving.MACHINE
    assert len(os.fsencode(name)) <= 255


def test_metadata_are_in_order_and_the_tensors_as_they_were(tmp_path: Path) -> None:
    texts = {name: f'"{name}" \u2028 é \x01\x7f\\ / 🙂' for name in ("c", "b", "é", "a")}
    state = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "a.safetensors", state, texts)
    data = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"].items()) == sorted(texts.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == texts
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())
    write_tensors(tmp_path / "b.safetensors", state, {})
