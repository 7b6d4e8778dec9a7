"""A conversion that is killed leaves the old target or the whole new one: see also `tests/weights/test_saving.py`."""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from killing import killed_at_size, killed_before

from sdxl_ref.config import InputError
from sdxl_ref.weights import folder_saving
from sdxl_ref.weights.leftovers import clear
from weights_convert.convert import convert

EXCHANGE = {"official": "os.rename", "diffusers": "ctypes.dlsym"}  # what comes before the target is in place


class Conversion:
    """Of a file over a target that is there already; a folder also holds what the layout does not name, and keeps."""

    def __init__(self, source: Path, folder: Path, layout: str) -> None:
        self.folder = folder / "targets"
        self.folder.mkdir()
        self.target = self.folder / "target.safetensors"
        self.run = partial(convert, source, self.target, layout, force=True)
        self.run()
        own = (
            {} if layout == "official" else {"README.md": b"mine", "unet/notes.txt": b"mine", ".git/objects/a": b"mine"}
        )
        old = {"": b"old"} if layout == "official" else {"model_index.json": b"{}", "unet/config.json": b"old"}
        self.new = contents(self.target) | own
        self.largest = max(map(len, self.new.values()))
        self.old = old | own
        self.put_old()

    def put_old(self) -> None:
        if self.target.is_dir():
            shutil.rmtree(self.target)
        for name, data in self.old.items():
            path = self.target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def is_new_after(self, kill: Callable[[Callable[[], object]], object]) -> bool:
        """Whether the target is the new one after a kill; the old one is then put there again."""
        kill(self.run)
        found = contents(self.target)
        assert found in (self.old, self.new)
        if found == self.new:
            self.put_old()
        return found == self.new


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(params=["official", "diffusers"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def conversion(tiny_refiner_file: Path, tmp_path: Path, layout: str) -> Conversion:
    return Conversion(tiny_refiner_file, tmp_path, layout)


def test_a_kill_leaves_the_old_or_the_whole_new(conversion: Conversion, layout: str) -> None:
    """After and before the target is replaced, and half way in the largest file."""

    def is_new_before(call: str) -> bool:
        return conversion.is_new_after(partial(kill_before, call))

    assert is_new_before("shutil.rmtree")  # of the temporary folder, where the old target is by then
    assert not is_new_before(EXCHANGE[layout])
    assert not conversion.is_new_after(partial(kill_at_size, conversion.largest // 2))
    [left] = [path for path in conversion.folder.iterdir() if path != conversion.target]  # each run clears the last
    conversion.run()
    assert contents(conversion.target) == conversion.new
    assert not left.exists()
    assert [path.name for path in conversion.folder.iterdir()] == ["target.safetensors"]


def test_where_names_cannot_be_swapped_too(
    tiny_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the old folder was moved away: the next run finds it, and refuses to replace it unasked."""
    conversion = Conversion(tiny_refiner_file, tmp_path, "diffusers")
    monkeypatch.setattr(folder_saving, "exchange", lambda *_: False)
    renamed = [killed_before(conversion.run, call, "os.rename") for call in (1,)]
    assert renamed == [True]
    assert not conversion.target.exists()
    with pytest.raises(InputError, match="is there already"):
        convert(tiny_refiner_file, conversion.target, "diffusers")
    assert contents(conversion.target) == conversion.old
    conversion.run()
    assert contents(conversion.target) == conversion.new


def kill_before(call: str, work: Callable[[], object]) -> None:
    assert killed_before(work, 0, call), f"the work ended without a call of {call}"


def kill_at_size(size: int, work: Callable[[], object]) -> None:
    assert killed_at_size(work, size), f"the work ended without a file of {size} bytes"


@pytest.mark.sweep
def test_a_kill_at_any_moment_leaves_the_old_or_the_whole_new(conversion: Conversion) -> None:
    """Before each of its calls that change files, one after the other, and at sizes of the largest file."""
    seen = []
    kills = []
    for call in count():
        seen.append(conversion.is_new_after(lambda work, call=call: kills.append(killed_before(work, call))))
        clear(conversion.folder)  # or the next run would, by more calls
        assert [path.name for path in conversion.folder.iterdir()] == ["target.safetensors"]
        if not kills[-1]:
            break
    assert set(seen) == {True, False}  # some kills came before the end, some after
    assert seen == sorted(seen)
    for tenth in range(1, 10):
        size = conversion.largest * tenth // 10
        assert not conversion.is_new_after(partial(kill_at_size, size))
