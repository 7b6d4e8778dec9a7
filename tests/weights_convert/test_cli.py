"""The command line in the frame of `sdxl-ref`: one-line errors, hints, streams, Ctrl-C."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
def test_ctrl_c(module: str, small_refiner_file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the libraries are still coming, and at work."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    function = {"sdxl_ref.weights.report": "open_checkpoint", "weights_convert.cli": "module_of"}[module]
    monkeypatch.setattr(f"{module}.{function}", interrupt)
    assert main(["inspect", str(small_refiner_file)]) == 1
    assert capsys.readouterr().err == ("weights-convert: stopped; nothing is at the target that was not there before\n")


def test_a_pipe_whose_reader_has_gone(small_refiner_file: Path) -> None:
    words = [sys.executable, "-m", "weights_convert", "inspect", str(small_refiner_file)]
    command = ["bash", "-c", 'set -o pipefail; "$@" | head -0', "bash", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_stream_that_is_full(
    small_refiner_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["inspect", str(small_refiner_file)]) == 1
    assert capsys.readouterr().err == "weights-convert: error: [Errno 28] No space left on device\n"


def test_streams_that_are_closed(small_refiner_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main(["inspect", str(small_refiner_file)]) == 0
    assert main(["inspect", "none"]) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_a_stream_cannot_show(
    encoding: str, small_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "猫.safetensors"
    shutil.copy(small_refiner_file, path)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(f"sys.{name}", stream)
    assert main(["inspect", str(path)]) == 0
    assert main(["convert", str(path), str(path), "--to", "official"]) == 2
    streams["stderr"].flush()
    shown = {name: stream.buffer.getvalue().decode("ascii") for name, stream in streams.items()}  # type: ignore[attr-defined]
    assert shown["stdout"].startswith(rf"{tmp_path}/\u732b.safetensors: SDXL-like refiner")
    assert shown["stderr"].startswith(rf"weights-convert: error: {tmp_path}/\u732b.safetensors is there already")
