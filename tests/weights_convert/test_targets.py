"""Targets that are refused, and those that are replaced."""

import os
import re
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdxl_ref.config import InputError
from sdxl_ref.weights import streaming as stream
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.cli import main
from weights_convert.convert import convert
from weights_convert.targets import link_or_copy, named_in_pipeline


def test_targets(tiny_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target.safetensors"
    target.write_text("precious")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            convert(tiny_refiner_file, **{"target": target, "to": "official", **options})
        assert target.read_text() == "precious"

    refused("is there already: name another target, or give --force")
    refused("expected an existing, writable folder", target=tmp_path / "no" / "such" / "file")
    refused("expected the layout official or diffusers, found 'onnx'", to="onnx")
    refused("is a file: name a folder", to="diffusers", force=True)
    refused("no such file", vae=tmp_path / "none.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused("needs 0.01 GB, and .* has 0.00 GB free", force=True)
    monkeypatch.undo()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused("No space left on device", force=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"target.safetensors"}
    convert(tiny_refiner_file, target, "official", force=True)
    assert open_checkpoint(target).config.kind == "refiner"


def test_force_is_advised_only_where_it_is_followed(tiny_refiner_file: Path, folder: Path, tmp_path: Path) -> None:
    """A target that `--force` would not replace is told as what it is, whether it is given or not."""
    other, file = tmp_path / "other", tmp_path / "file.safetensors"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    file.write_text("precious")
    cases = [
        (file, "diffusers", "is a file: name a folder"),
        (folder, "official", "is a folder: name a file"),
        (other, "official", "is a folder that holds other things than a model"),
        (other, "diffusers", "is a folder that holds other things than a model"),
    ]
    for force in (False, True):
        for target, to, message in cases:
            for part in (None, "vae") if target != folder else (None,):
                with pytest.raises(InputError, match=message):
                    convert(tiny_refiner_file, target, to, force=force, part=part)


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "model.safetensors.bin"])
def test_no_file_is_named_as_a_pickle(tiny_refiner_file: Path, tmp_path: Path, name: str) -> None:
    for part in (None, "unet"):
        with pytest.raises(InputError, match=f"cannot write .*{name}: expected a name that ends in .safetensors"):
            convert(tiny_refiner_file, tmp_path / name, "official", part=part)
    words = ["merge", str(tiny_refiner_file), "none.safetensors", "--out", str(tmp_path / name)]
    assert main(["lora", *words]) == 2
    assert not list(tmp_path.iterdir())


def test_force_replaces_models_alone(tiny_refiner_file: Path, folder: Path, tmp_path: Path) -> None:
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
        refused(tiny_refiner_file, other, to, "is a folder that holds other things than a model")
        for name in ("link.safetensors", "circle", "pipe"):
            refused(tiny_refiner_file, tmp_path / name, to, "is a link or a device")
    refused(tiny_refiner_file, folder, "official", "is a folder: name a file")
    refused(folder, folder / "unet", "diffusers", "lie one inside the other")
    refused(folder / "unet" / "..", tmp_path, "diffusers", "lie one inside the other")
    assert (other / "letter.txt").read_text() == "dear"
    assert precious.read_text() == "precious"
    assert open_checkpoint(folder).config.kind == "refiner"


@pytest.mark.parametrize("name", [".", "/", "..", "x" * 300, "x" * 300 + "/y"])
def test_targets_without_a_name_of_their_own_or_with_too_long_a_one(
    tiny_refiner_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(tiny_refiner_file)
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


def test_a_name_of_255_bytes_is_written(tiny_refiner_file: Path, tmp_path: Path) -> None:
    target = tmp_path / ("猫" * 81 + ".safetensors")
    convert(tiny_refiner_file, target, "official")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


# --- what is the user's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_links", [True, False])
def test_force_keeps_what_the_layout_does_not_name(
    tiny_refiner_file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Bits, rights and links; and what lies beside the target."""
    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    own = {"README.md": "mine", ".git/objects/ab/c": "object", "unet/notes.txt": "mine", "vae_1_0/config.json": "{}"}
    for name, text in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".git" / "hook").write_text("#!/bin/sh")
    (folder / ".git" / "hook").chmod(0o750)
    (folder / "elsewhere").symlink_to(tmp_path / "nowhere")
    folder.chmod(0o700)
    (tmp_path / ".folder.old").write_text("mine")
    report = str(convert(tiny_refiner_file, folder, "diffusers", force=True))
    assert {name: (folder / name).read_text() for name in own} == own
    assert stat.S_IMODE((folder / ".git" / "hook").stat().st_mode) == 0o750
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.readlink(folder / "elsewhere") == str(tmp_path / "nowhere")
    assert (tmp_path / ".folder.old").read_text() == "mine"
    assert f"kept in {folder}: .git, README.md, elsewhere, unet/notes.txt, vae_1_0, which the layout does" in report
    assert {path.name for path in tmp_path.iterdir()} == {"folder", ".folder.old"}


def no_links(*_: object, **__: object) -> None:
    raise OSError(95, "Operation not supported")


def test_force_replaces_all_that_the_layout_names(
    tiny_base_file: Path, tiny_refiner_file: Path, tmp_path: Path
) -> None:
    """Other variants, shards and pickles of the older model too, which would be read in the place of the new one."""
    target = tmp_path / "model"
    convert(tiny_base_file, target, "diffusers", variant="fp16")
    for name in ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model-00001-of-00002.safetensors"):
        (target / name).write_text("old")
    (target / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    (target / "tokenizer" / "added_tokens.json").write_text("{}")
    convert(tiny_refiner_file, target, "diffusers", force=True)
    convert(tiny_refiner_file, tmp_path / "fresh", "diffusers")
    assert names_in(target) == names_in(tmp_path / "fresh")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_every_name_that_a_conversion_writes_is_the_layouts(tiny_base_file: Path, tmp_path: Path) -> None:
    convert(tiny_base_file, tmp_path / "model", "diffusers", variant="fp16")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) > 15
    assert all(named_in_pipeline(path.relative_to(tmp_path / "model")) for path in files)
    for other in ("README.md", "unet", "unet/README.md", "unet/model.onnx", "vae_1_0/config.json", "a/b/config.json"):
        assert not named_in_pipeline(Path(other))


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_of_two_conversions_to_one_new_target_one_wins_and_the_other_is_told(
    to: str, tiny_refiner_file: Path, tiny_base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found the target free before either writes."""
    target = tmp_path / "target.safetensors"
    both_write = threading.Barrier(2)
    header = stream.header
    waiting = threading.local()

    def header_of_both(*arguments: Any) -> bytes:
        if not getattr(waiting, "done", False):
            waiting.done = True
            both_write.wait(timeout=60)
        return header(*arguments)

    monkeypatch.setattr(stream, "header", header_of_both)
    outcomes: dict[str, str] = {}

    def work(kind: str, source: Path) -> None:
        try:
            convert(source, target, to)
            outcomes[kind] = "won"
        except InputError as error:
            outcomes[kind] = str(error)

    sources = {"refiner": tiny_refiner_file, "base": tiny_base_file}
    threads = [threading.Thread(target=work, args=item) for item in sources.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [kind for kind, outcome in outcomes.items() if outcome == "won"]
    [told] = [outcome for outcome in outcomes.values() if outcome != "won"]
    assert told == f"{target} has come there meanwhile, and stays: name another target, or give --force to replace it"
    assert open_checkpoint(target).config.kind == winner
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("to", ["official", "diffusers"])
@pytest.mark.parametrize("has_links", [True, False])
def test_what_comes_to_the_target_meanwhile_stays(
    to: str, has_links: bool, tiny_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target.safetensors"
    header = stream.header

    def somebody_writes(*arguments: Any) -> bytes:
        target.write_text("precious")
        return header(*arguments)

    monkeypatch.setattr(stream, "header", somebody_writes)
    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    with pytest.raises(InputError, match=r"target\.safetensors has come there meanwhile, and stays"):
        convert(tiny_refiner_file, target, to)
    assert target.read_text() == "precious"


def test_a_file_system_without_links(tiny_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", no_links)
    convert(tiny_refiner_file, tmp_path / "a.safetensors", "official")
    assert load_file(tmp_path / "a.safetensors").keys() == load_file(tiny_refiner_file).keys()


def test_nothing_that_is_read_is_written_on(tiny_refiner_file: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    shutil.copy(tiny_refiner_file, file)
    os.link(file, tmp_path / "same.safetensors")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for source, target, options in (
        (file, file, {}),
        (file, tmp_path / "same.safetensors", {}),
        (file, weights, {"vae": weights}),
        (file, weights, {"vae": folder / "vae"}),
        (folder, weights, {}),
        (file, folder, {"to": "diffusers", "vae": weights}),
        (folder, folder, {"to": "diffusers"}),
    ):
        before = {path: path.read_bytes() for path in (file, weights)}
        with pytest.raises(InputError, match=r"is what is read|lie one inside the other"):
            convert(source, target, **{"to": "official", "force": True, **options})
        assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(InputError, match="is what is read"):
        convert(Path("pocket-refiner"), open_checkpoint("pocket-refiner").path, "official", force=True)
    convert(folder, folder / "whole.safetensors", "official")  # beside the model's files
    assert open_checkpoint(folder).config == open_checkpoint(folder / "whole.safetensors").config


def test_a_copy_where_a_file_cannot_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("mine")
    link_or_copy(tmp_path / "a", tmp_path / "linked")
    monkeypatch.setattr("os.link", no_links)
    link_or_copy(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "linked").samefile(tmp_path / "a")
    assert not (tmp_path / "copied").samefile(tmp_path / "a")
    assert (tmp_path / "copied").read_text() == "mine"
