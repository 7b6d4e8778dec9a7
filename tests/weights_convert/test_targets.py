"""Targets that are refused, and those that are replaced."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.cli import main
from weights_convert.convert import convert


def test_targets(small_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target.safetensors"
    target.write_text("precious")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            convert(small_refiner_file, **{"target": target, "to": "official", **options})
        assert target.read_text() == "precious"

    refused("is there already: name another target, or give --force")
    refused("expected an existing, writable folder", target=tmp_path / "no" / "such" / "file")
    refused("expected the layout official or diffusers, found 'onnx'", to="onnx")
    refused("is a file: name a folder", to="diffusers", force=True)
    refused("no such file", vae=tmp_path / "none.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused("needs 0.04 GB, and .* has 0.00 GB free", force=True)
    monkeypatch.undo()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused("No space left on device", force=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"target.safetensors"}
    convert(small_refiner_file, target, "official", force=True)
    assert open_checkpoint(target).config.kind == "refiner"


def test_force_replaces_models_alone(small_refiner_file: Path, folder: Path, tmp_path: Path) -> None:
    other, precious = tmp_path / "other", tmp_path / "precious.safetensors"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    precious.write_text("precious")
    (tmp_path / "link.safetensors").symlink_to(precious)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")

    def refused(source: Path, target: Path, to: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            convert(source, target, to, force=True)

    for to in ("official", "diffusers"):
        refused(small_refiner_file, other, to, "is a folder that holds other things than a model")
        for name in ("link.safetensors", "circle", "pipe"):
            refused(small_refiner_file, tmp_path / name, to, "is a link or a device")
    refused(small_refiner_file, folder, "official", "is a folder: name a file")
    refused(folder, folder / "unet", "diffusers", "lie one inside the other")
    refused(folder / "unet" / "..", tmp_path, "diffusers", "lie one inside the other")
    assert (other / "letter.txt").read_text() == "dear"
    assert precious.read_text() == "precious"
    assert open_checkpoint(folder).config.kind == "refiner"


@pytest.mark.parametrize("name", [".", "/", "..", "x" * 300, "x" * 300 + "/y"])
def test_targets_without_a_name_of_their_own_or_with_too_long_a_one(
    small_refiner_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(small_refiner_file)
    for words in (
        ["convert", source, name, "--to", "official", "--force"],
        ["convert", source, name, "--to", "diffusers"],
        ["convert", source, "out.safetensors", "--to", "official", "--vae", "x" * 300],
        ["convert", "x" * 300, name, "--to", "official"],
        ["inspect", "x" * 300],
    ):
        assert main(words) == 2
        assert re.fullmatch("weights-convert: error: .+\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_name_of_255_bytes_is_written(small_refiner_file: Path, tmp_path: Path) -> None:
    target = tmp_path / ("猫" * 81 + ".safetensors")
    convert(small_refiner_file, target, "official")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
