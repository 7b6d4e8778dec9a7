"""The frame of the command line: commands, help, misspellings, streams, statuses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import runpy
import shutil
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import pytest
from cases import sample
from command_line import Refine, assert_one_line, process

from sdxl_ref import __version__, cli
from sdxl_ref.cli import Parser, add_commands, main, summaries
from sdxl_ref.pipelines import ImageToImagePipeline

COMMANDS = ["demo", "evaluate", "fetch", "generate", "grid", "info", "refine", "train"]

# --- commands and their help --------------------------------------------------------------------------------------


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of([], capsys)
    found = summaries()
    assert set(COMMANDS) <= set(found)
    for name, summary in found.items():
        assert f"    {name} " in shown
        assert " ".join(summary.split()) in " ".join(shown.split())


@pytest.mark.parametrize("command", summaries())
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of([command], capsys)
    assert shown.startswith(f"usage: sdxl-ref {command} ")
    assert summaries()[command].split()[0] in shown


def test_a_new_file_in_the_folder_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first line of its docstring; a module without such a line is none. Nothing is imported for the help."""
    folder = tmp_path / "commands"
    shutil.copytree(cli.COMMANDS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "sing.py").write_text('"""`sdxl-ref sing`: a song for a picture."""\n\nraise AssertionError\n')
    (folder / "helper.py").write_text('"""What the singing needs."""\n')
    monkeypatch.setattr("sdxl_ref.cli.COMMANDS", folder)
    shown = help_of([], capsys)
    [line] = [line for line in shown.splitlines() if line.split()[:1] == ["sing"]]
    assert line.endswith("a song for a picture")
    assert "helper" not in shown
    assert all(f"    {command} " in shown for command in COMMANDS)


HELP = """
import sys
from sdxl_ref.cli import main
try:
    main(["--help"])
finally:
    print("torch" in sys.modules)
"""


def test_the_help_comes_at_once_and_imports_no_torch() -> None:
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "False"
    assert seconds < 2  # torch alone takes longer; 0.2 s where nothing else runs


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sdxl-ref {__version__}\n"


# --- wrong usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND (see sdxl-ref --help)"),
        (["refine"], "the following arguments are required: image, --prompt (see sdxl-ref refine --help)"),
        (["info"], "the following arguments are required: MODEL (see sdxl-ref info --help)"),
        (["info", "none.safetensors"], "no such checkpoint: none.safetensors"),
        (["info", "a", "b"], "unrecognized arguments: b (see sdxl-ref info --help)"),
    ],
    ids=str,
)
def test_wrong_usage(words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["refin", "a.png"], "invalid choice: 'refin' "),
        (["refin", "a.png"], "did you mean 'refine'?"),
        (["info", "a", "--chek"], "unrecognized arguments: --chek: did you mean '--check'? (see sdxl-ref info --help)"),
        (["refine", "a.png", "--checkpoint", "b", "--prompt", "c", "--guidence-scale", "2"], "'--guidance-scale'?"),
        (["refine", "a.png", "--checkpoint", "b", "--prompt", "c", "--dtype", "float23"], "did you mean 'float32'?"),
        (["fetch", "refinr"], "did you mean 'refiner'?"),
    ],
    ids=str,
)
def test_a_misspelt_word_is_answered_with_the_nearest(
    words: list[str], hint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert_one_line(capsys.readouterr().err, hint)


@pytest.mark.parametrize(("sampler", "near"), [("eular", "euler"), ("dpmp_2m", "dpmpp_2m"), ("unpic", "unipc")])
def test_a_misspelt_sampler_is_answered_with_the_nearest(
    sampler: str, near: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(sampler=sampler) == 2
    assert_one_line(
        capsys.readouterr().err, f"unknown sampler '{sampler}': did you mean '{near}'? expected one of euler"
    )


# --- stopped, warned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["sdxl_ref.pipelines.ImageToImagePipeline.decode", "sdxl_ref.cli.import_module"])
def test_stopped_from_the_keyboard(
    where: str, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the work, or while the libraries are still coming."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = refine.words()
    if where.endswith("decode"):
        monkeypatch.setattr(ImageToImagePipeline, "decode", interrupt)
    else:
        monkeypatch.setattr(where, interrupt)
    assert main(words) == 1
    assert capsys.readouterr().err == "sdxl-ref: stopped\n"
    assert os.listdir(here) == []


DEAF = """
import contextlib, os, signal, time
with contextlib.suppress(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
print("imported")
"""
RUNS_DEAF = """
import signal
from sdxl_ref import cli
print(cli.run("tool", lambda: cli.module_of("deaf", "work").run()), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_stop_that_an_import_swallows_is_one_when_it_is_over(tmp_path: Path) -> None:
    """As C code does while it is loaded."""
    (tmp_path / "deaf" / "commands").mkdir(parents=True)
    (tmp_path / "deaf" / "__init__.py").touch()
    (tmp_path / "deaf" / "commands" / "work.py").write_text(DEAF)
    path = os.pathsep.join([str(tmp_path), str(cli.COMMANDS.parent.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", RUNS_DEAF], capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("imported\n1 set()\n", "tool: stopped\n")


STOPPED_IN_TORCH = """
import os, signal, sys
def stop(*_):
    print("torch" in sys.modules, "torch.nn" in sys.modules, file=sys.stderr)
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGALRM, stop)
class Watch:
    def find_spec(self, name, *_):
        if name == "torch._utils":
            signal.setitimer(signal.ITIMER_REAL, 0.001)
sys.meta_path.insert(0, Watch())
from {package}.cli import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize(
    ("package", "words", "line"),
    [
        ("sdxl_ref", ["refine", "--help"], "sdxl-ref: stopped"),
        pytest.param(
            "weights_convert",
            ["diff", "a", "b"],
            "weights-convert: stopped; nothing is at the target that was not there before",
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_stopped_while_torch_is_imported(package: str, words: list[str], line: str) -> None:
    code = STOPPED_IN_TORCH.format(package=package, words=words)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"True False\n{line}\n")


@pytest.mark.parametrize("package", ["sdxl_ref", "weights_convert"])
def test_stopped_while_the_command_line_is_imported(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, f"{package}.cli", Stopping("cli"))
    with pytest.raises(SystemExit, match=f"^{package.replace('_', '-')}: stopped"):
        runpy.run_module(package, run_name="__main__")


def test_warnings_are_lines_on_standard_error(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refine(prompt=" ".join(["cat"] * 75) + " on a purple mat") == 0
    message = "warning: the prompt is longer than 77 tokens; cut: 'on a purple mat'\n"
    assert capsys.readouterr().err == message


# --- as a process -------------------------------------------------------------------------------------------------


def test_a_process_that_succeeds() -> None:
    result = process(["--version"])
    assert (result.returncode, result.stdout, result.stderr) == (0, f"sdxl-ref {__version__}\n", "")


def test_a_process_that_fails() -> None:
    result = process(["banana"])
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, "invalid choice: 'banana'")


FULL = "sdxl-ref: error: [Errno 28] No space left on device\n"
STREAMS = [("> /dev/full", 1, FULL), ("| head -0", 0, ""), (">&-", 0, ""), ("2>&-", 0, "")]
PRINTS = """
import sys, time
from sdxl_ref.cli import run
def work():
    time.sleep(0.1)  # who reads has gone by then
    print("a line")
    if "flush" in sys.argv:
        sys.stdout.flush()
    if "fail" in sys.argv:
        raise OSError("the disk is gone")
    return 0
sys.exit(run("sdxl-ref", work))
"""


def redirected(command: list[str], redirection: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    line = f'set -o pipefail; "$@" {redirection}'
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["bash", "-c", line, "bash", *command], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("redirection", "status", "error"), STREAMS)
def test_streams_that_are_full_or_closed(redirection: str, status: int, error: str) -> None:
    """What cannot be written is told, but for a reader who has gone; a closed stream is nobody's mistake."""
    result = redirected([sys.executable, "-c", PRINTS], redirection)
    assert (result.returncode, result.stderr) == (status, error)


@pytest.mark.parametrize("command", ["sdxl-ref", "weights-convert"])
@pytest.mark.parametrize(("words", "unbuffered"), [("--help", ""), ("--help", "1"), ("--version", "")])
def test_help_that_cannot_be_written(command: str, words: str, unbuffered: str) -> None:
    name = command.replace("-", "_")
    result = redirected([sys.executable, "-m", name, words], "> /dev/full", unbuffered)
    assert (result.returncode, result.stderr) == (1, f"{command}: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("unbuffered", sample(["", "1"], ""))
def test_a_reader_of_info_who_has_seen_enough_changes_no_status(unbuffered: str, tiny_refiner_file: Path) -> None:
    """Whether he goes before the lines are written or after: `| head -1` is a race."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "sdxl_ref", "info", str(tiny_refiner_file)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_who_has_gone_stops_work_that_is_not_done() -> None:
    result = redirected([sys.executable, "-c", PRINTS, "flush"], "| head -0")
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("redirection", ["", ">&-"])
def test_a_system_that_fails_is_told_in_one_line(redirection: str) -> None:
    result = redirected([sys.executable, "-c", PRINTS, "fail"], redirection)
    assert (result.returncode, result.stderr) == (1, "sdxl-ref: error: the disk is gone\n")


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [STREAMS[0], ("| head -0", 1, ""), *(pytest.param(*case, marks=pytest.mark.sweep) for case in STREAMS[2:])],
)
def test_a_command_whose_streams_are_full_or_closed(
    redirection: str, status: int, error: str, refine: Refine, here: Path
) -> None:
    """No picture is left where the work was not told of to the end."""
    result = redirected([sys.executable, "-m", "sdxl_ref", *refine.words(out="out.png")], redirection)
    assert (result.returncode, result.stderr) == (status, error)
    assert os.listdir(here) == (["out.png"] if status == 0 else [])


@pytest.mark.sweep  # in this process: test_calling.py
def test_a_progress_bar_on_a_terminal_with_the_true_number_of_steps(refine: Refine, here: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "sdxl_ref", *refine.words(steps=10, strength=0.35)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(terminal, 4096):
            shown += block.decode()
    os.close(terminal)
    assert result.returncode == 0
    assert "3/3" in shown
    assert "step" in shown
    assert "step" not in result.stdout.decode().replace("3 of 10 steps", "")


def test_a_command_of_two_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkg" / "commands").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").touch()
    text = '"""`tool two-words`: does it."""\n\n\ndef arguments(p):\n    p.add_argument("--x")\n'
    (tmp_path / "pkg" / "commands" / "two_words.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    top = Parser(prog="tool")
    add_commands(top, tmp_path / "pkg" / "commands", ["two-words"])
    assert top.parse_args(["two-words", "--x", "1"]).x == "1"


@pytest.mark.sweep
@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
def test_weights_convert_whose_output_is_full_or_closed(redirection: str, tiny_refiner_file: Path) -> None:
    result = redirected([sys.executable, "-m", "weights_convert", "inspect", str(tiny_refiner_file)], redirection)
    full = (1, "weights-convert: error: [Errno 28] No space left on device\n")
    assert (result.returncode, result.stderr) == (full if "full" in redirection else (0, ""))
