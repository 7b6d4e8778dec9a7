"""The command line in the frame of `sdxl-ref`: one-line errors, hints, streams, Ctrl-C."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
from adapter_files import random_file
from cases import diagonal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_ref.adapters.forms import FORMS
from weights_convert.cli import main

COMMANDS = ["inspect", "convert", "verify", "diff", "lora"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convrt a b --to official", "invalid choice: 'convrt'.*did you mean 'convert'.* .see weights-convert --help."),
        ("convert a b --to official --forse", "did you mean '--force'.* .see weights-convert convert --help."),
        ("convert a b --to oficial", "invalid choice: 'oficial'.*'official'.* .see weights-convert convert --help."),
        ("inspect a --varient=x", "did you mean '--variant'.* .see weights-convert inspect --help."),
        ("lora merge a b --out c --froce", "did you mean '--force'.* .see weights-convert lora merge --help."),
        (
            "lora extract a b --out c --rank 1 --form koya",
            "invalid choice: 'koya'.*'kohya'.*weights-convert lora extract",
        ),
        ("lora extract a b --out c --rank two", "argument --rank: invalid int value: 'two'"),
        ("lora", "required: COMMAND"),
        ("lora convert a", "required: --model, --out"),
    ],
)
def test_a_wrong_word_is_told_with_the_nearest_one(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch("weights-convert: error: .*\n", captured.err)
    assert re.search(message, captured.err)


@pytest.mark.parametrize("words", ["", "inspect", "convert", "verify", "diff", "lora", "lora extract"])
def test_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words.split(), "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: weights-convert {words}".rstrip())
    if not words:
        assert all(command in help_text for command in COMMANDS)
    if words == "lora extract":
        assert "(default: kohya)" in help_text
        assert all(form in help_text for form in FORMS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("weights-convert 0.")


@pytest.mark.parametrize("module", ["sdxl_ref.weights.report", "weights_convert.cli"])
def test_ctrl_c(module: str, tiny_refiner_file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the libraries are still coming, and at work."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    function = {"sdxl_ref.weights.report": "open_checkpoint", "weights_convert.cli": "module_of"}[module]
    monkeypatch.setattr(f"{module}.{function}", interrupt)
    assert main(["inspect", str(tiny_refiner_file)]) == 1
    assert capsys.readouterr().err == ("weights-convert: stopped; nothing is at the target that was not there before\n")


@pytest.mark.parametrize(("command", "unbuffered"), diagonal(["inspect", "diff"], ["", "1"]))
def test_a_pipe_whose_reader_has_gone(command: str, unbuffered: str, tiny_refiner_file: Path) -> None:
    """The status is that of the work, whether the lines are written before or after he goes."""
    files = [str(tiny_refiner_file)] * (2 if command == "diff" else 1)
    words = [sys.executable, "-m", "weights_convert", command, *files]
    shell = ["bash", "-c", 'set -o pipefail; "$@" | head -0', "bash", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(shell, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_stream_that_is_full(
    tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["inspect", str(tiny_refiner_file)]) == 1
    assert capsys.readouterr().err == "weights-convert: error: [Errno 28] No space left on device\n"


def test_streams_that_are_closed(tiny_refiner_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main(["inspect", str(tiny_refiner_file)]) == 0
    assert main(["inspect", "none"]) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_a_stream_cannot_show(
    encoding: str, tiny_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "猫.safetensors"
    shutil.copy(tiny_refiner_file, path)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(f"sys.{name}", stream)
    assert main(["inspect", str(path)]) == 0
    assert main(["convert", str(path), str(path), "--to", "official"]) == 2
    streams["stderr"].flush()
    shown = {name: stream.buffer.getvalue().decode("ascii") for name, stream in streams.items()}  # type: ignore[attr-defined]
    assert shown["stdout"].startswith(rf"{tmp_path}/\u732b.safetensors: SDXL-like refiner")
    assert shown["stderr"].startswith(rf"weights-convert: error: {tmp_path}/\u732b.safetensors is there already")


@pytest.fixture(scope="module")
def foreign(tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, another one, a folder and an adapter, all with names and metadata in other scripts."""
    folder = tmp_path_factory.mktemp("桜")
    state = load_file(tiny_refiner_file)
    with safe_open(tiny_refiner_file, framework="pt") as file:
        metadata = file.metadata() | {"modelspec.title": "桜ミックス 🌸 v2", "modelspec.author": "名無し"}
    save_file(state, folder / "桜.safetensors", metadata)
    save_file(
        state | {"model_ema.桜": state["first_stage_model.quant_conv.bias"] + 1}, folder / "無.safetensors", metadata
    )
    random_file(peers.TINY_REFINER, folder / "猫.safetensors")
    assert main(["convert", str(folder / "桜.safetensors"), str(folder / "花"), "--to", "diffusers"]) == 0
    return folder


COMMAND_LINES = {  # and the status
    "inspect 桜.safetensors": 0,
    "inspect 花": 0,
    "inspect 猫.safetensors": 0,
    "verify 無.safetensors": 0,
    "diff 桜.safetensors 無.safetensors": 1,
    "convert 花 {out}/花.safetensors --to official": 0,
    "convert 無.safetensors {out}/花 --to diffusers": 0,
    "lora merge 桜.safetensors 猫.safetensors --out {out}/花.safetensors": 0,
    "inspect 無い.safetensors": 2,
    "convert 桜.safetensors 花 --to diffusers": 2,
}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_terminal_that_cannot_show_a_name(
    line: str, encoding: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command does its work, and says what it says in escapes."""
    monkeypatch.chdir(foreign)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(f"sys.{name}", stream)
    status = main(line.format(out=tmp_path).split())
    for stream in streams.values():
        stream.flush()
    shown = {name: stream.buffer.getvalue() for name, stream in streams.items()}  # type: ignore[attr-defined]
    assert status == COMMAND_LINES[line], shown["stderr"]
    if not line.startswith("verify"):  # which names no file
        assert rb"\u" in shown["stderr" if status == 2 else "stdout"]
    assert shown["stderr"].count(b"\n") == (status == 2)
    if "{out}" in line:
        assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["花"]
