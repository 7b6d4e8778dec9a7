"""`sdxl-ref fetch`: an official file from the hub, its hash, and what of a folder is the user's."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import hub as hubs
import pytest
from cases import sample
from command_line import assert_one_line
from hub import Hub

from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.weights import fetching
from sdxl_ref.weights.identity import KNOWN_FILES
from sdxl_ref.weights.locking import locked

REPOSITORY = "stabilityai/stable-diffusion-xl-refiner-1.0"
NAME = "sd_xl_refiner_1.0.safetensors"
STEM = "sd_xl_refiner_1.0"
BESIDE = ".sdxl-ref-fetch-refiner"
FETCH = """
from sdxl_ref.cli import main
from sdxl_ref.weights import identity

identity.KNOWN_FILES.clear()  # a small file stands in for the official one, whose hash it takes over
identity.KNOWN_FILES[{digest!r}] = ("sd_xl_refiner_1.0", "1.0")
print(main(["fetch", "refiner", "--out", "models"]))
"""


class Fetch:
    """`fetch` into `models`, from a hub whose file is `content`; only `official` has the hash of the official one."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.models = folder / "models"
        self.file = folder / "repository" / NAME
        self.hub.repositories[REPOSITORY] = self.file.parent
        self.file.parent.mkdir()
        self.models.mkdir()
        self.official = os.urandom(200_000)

    def __call__(self, content: bytes) -> tuple[int, subprocess.CompletedProcess[str]]:
        self.file.write_bytes(content)
        code = FETCH.format(digest=hashlib.sha256(self.official).hexdigest())
        done = hubs.run(code, self.hub, self.folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        return int(done.stdout.split()[-1]), done

    def halves(self) -> list[Path]:
        return list(self.models.rglob("*.incomplete"))

    def listing(self) -> list[str]:
        return sorted(os.listdir(self.models))


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    return Fetch(hub, tmp_path)


def test_a_file_gets_its_name_only_where_its_hash_is_the_official_one(fetch: Fetch) -> None:
    """What is refused is kept, under numbers, and never in the place of an older one."""
    for name in ("refused", "refused-2"):
        (fetch.models / f"{STEM}.{name}").write_text("an older one")
    status, done = fetch(b"something else")
    assert status == 2
    assert f"models/{STEM}.refused-3 is not the official file: expected sha256 " in done.stderr
    assert (fetch.models / f"{STEM}.refused-3").read_bytes() == b"something else"
    for name in ("refused", "refused-2"):
        assert (fetch.models / f"{STEM}.{name}").read_text() == "an older one"
    assert fetch.listing() == [f"{STEM}.refused", f"{STEM}.refused-2", f"{STEM}.refused-3"]
    status, done = fetch(fetch.official)
    assert status == 0
    assert f"models/{NAME}: sha256 is the official one" in done.stdout
    assert (fetch.models / NAME).read_bytes() == fetch.official
    assert fetch.listing() == [f"{STEM}.refused", f"{STEM}.refused-2", f"{STEM}.refused-3", NAME]


def test_the_first_refused_file_has_no_number(fetch: Fetch) -> None:
    status, _ = fetch(b"something else")
    assert status == 2
    assert fetch.listing() == [f"{STEM}.refused"]


def test_the_same_bytes_are_there_already(fetch: Fetch) -> None:
    """Nothing is asked of the hub, and what a killed download left is cleared."""
    (fetch.models / NAME).write_bytes(fetch.official)
    written = (fetch.models / NAME).stat().st_mtime_ns
    (fetch.models / BESIDE).mkdir()
    (fetch.models / BESIDE / "half").write_text("half")
    status, done = fetch(fetch.official)
    assert status == 0
    assert f"models/{NAME} is there already: sha256 is the official one" in done.stdout
    assert fetch.hub.requests == []
    assert (fetch.models / NAME).stat().st_mtime_ns == written
    assert fetch.listing() == [NAME]


@pytest.mark.parametrize("kind", sample(["file", "folder", "a link to nothing"], "file"))
def test_what_is_there_is_not_replaced(kind: str, fetch: Fetch) -> None:
    target = fetch.models / NAME
    if kind == "file":
        target.write_text("precious")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    before = target.lstat().st_mtime_ns
    status, done = fetch(fetch.official)
    assert status == 2
    assert_one_line(done.stderr, f"models/{NAME} is there already, and is not the official file, whose sha256 is ")
    assert "move it away, or choose another folder with --out" in done.stderr
    assert fetch.hub.requests == []
    assert target.lstat().st_mtime_ns == before
    assert fetch.listing() == [NAME]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no hard links."""

    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    for can_link in (True, False):
        if not can_link:
            monkeypatch.setattr("os.link", no_links)
        new = tmp_path / f"new {can_link}"
        new.write_text("new")
        target = tmp_path / f"target {can_link}"
        target.write_text("precious")
        with pytest.raises(FileExistsError):
            fetching.put_new(new, target)
        assert target.read_text() == "precious"
        target.unlink()
        fetching.put_new(new, target)
        assert target.read_text() == "new"
        assert not new.exists()


@pytest.mark.sweep
def test_killed_downloads_do_not_pile_up(fetch: Fetch) -> None:
    """Two runs are killed half-way; the third leaves nothing beside the file."""
    fetch.official = bytes(24 << 20)  # huggingface_hub writes 10 MB at a time
    fetch.file.write_bytes(fetch.official)
    fetch.hub.is_slow = True
    for _ in range(2):
        process = hubs.start(FETCH.format(digest=hashlib.sha256(fetch.official).hexdigest()), fetch.hub, fetch.folder)
        begun = time.time()
        while not any(half.stat().st_size and half.stat().st_mtime > begun for half in fetch.halves()):
            assert time.time() < begun + 60
            assert process.poll() is None
            time.sleep(0.05)
        assert fetch.listing() == [BESIDE]
        assert len(fetch.halves()) == 1
        process.kill()
        process.communicate()
    fetch.hub.is_slow = False
    status, _ = fetch(fetch.official)
    assert status == 0
    assert (fetch.models / NAME).read_bytes() == fetch.official
    assert fetch.listing() == [NAME]


def test_two_fetches_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(here / BESIDE, ""):
        assert main(["fetch", "refiner"]) == 2
    assert_one_line(capsys.readouterr().err, ". is being fetched into already: wait for its end")


def test_the_folder_has_to_be_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "refiner", "--out", "none"]) == 2
    assert_one_line(capsys.readouterr().err, "expected an existing folder, found none")


def test_every_official_file_has_one_hash() -> None:
    for _, name in fetching.REPOSITORIES.values():
        assert KNOWN_FILES[fetching.official_digest(name)] == (name.removesuffix(".safetensors"), "1.0")


def test_a_lock_is_no_pipe(tmp_path: Path) -> None:
    """Which would wait for a reader."""
    os.mkfifo(tmp_path / ".lock")
    with (
        pytest.raises(InputError, match=r"\.lock is a pipe or a device: expected a regular file"),
        locked(tmp_path, ""),
    ):
        pass
