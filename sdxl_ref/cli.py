"""The command line: `sdxl-ref COMMAND`, and the frame that `weights-convert` shares.

A command is a module of `sdxl_ref.commands` whose docstring begins with its name and what it does ("`sdxl-ref refine`:
…"), with `arguments(parser)` and `run(arguments)`; it is found in the folder, and imported when it runs.
Exit status 0 on success, 2 with one line for bad input, 1 for anything else. A reader of standard output who has gone
(`| head -1`) stops the work, and that is a 1; what he has not read of work that is done changes no status.
"""

import argparse
import ast
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sdxl_ref import __version__
from sdxl_ref.config import InputError

COMMANDS = Path(__file__).parent / "commands"
TITLE = re.compile(r"`[a-z-]+ (?P<name>[a-z-]+)`: (?P<summary>.+)")
# GNU OpenMP: how long a thread that waits for the others keeps its core from other programs.
YIELDING = ("GOMP_SPINCOUNT", "10000")


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would end the process, and names the option that was perhaps meant."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version; argparse's own method passes over what cannot be written."""
        print(message, end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        from sdxl_ref.commands.misspelt import with_hint

        raise InputError(f"{with_hint(message)} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from sdxl_ref.commands.misspelt import unrecognized

            raise InputError(unrecognized(getattr(arguments, "parser", self), unknown))
        return arguments


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_silent = action.default is False or action.default in (None, "", [])  # 0 is told
        return action.help if is_silent else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault(*YIELDING)  # before torch is imported
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        arguments = parser(words).parse_args(words)
        return module_of("sdxl_ref", arguments.command).run(arguments) or 0

    return run("sdxl-ref", work)


def parser(words: Sequence[str]) -> Parser:
    """All commands by name; the options of the one that the words begin with, which alone is imported."""
    top = Parser(prog="sdxl-ref", description="Stable Diffusion XL's refiner, and the system around it.")
    top.add_argument("--version", action="version", version=f"sdxl-ref {__version__}")
    add_commands(top, COMMANDS, words)
    return top


def add_commands(top: Parser, folder: Path, words: Sequence[str]) -> None:
    """Every command of a package's folder by name, and the options of the one that the words begin with."""
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in summaries(folder).items():
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=Help)
        command.set_defaults(parser=command, words=words[1:])  # for options that depend on them
        if name in words[:1]:
            module_of(folder.parent.name, name).arguments(command)


def module_of(package: str, command: str) -> Any:
    """The module of a command: `my_command.py` is `my-command`.

    Ctrl-C waits until it is imported: C code that is being loaded may swallow it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return import_module(f"{package}.commands.{command.replace('-', '_')}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def summaries(folder: Path = COMMANDS) -> dict[str, str]:
    """Every command with what it does, from the first line of its module, which is not imported."""
    commands = {}
    for path in sorted(folder.glob("*.py")):
        title = TITLE.match(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        if title:
            commands[title["name"]] = title["summary"].rstrip(".")
    return commands


def run(name: str, work: Callable[[], int], stopped: str = "stopped") -> int:
    """What a command's work returns, or the status of its failure, which is told in one line on standard error.

    `stopped` is that line for Ctrl-C.
    """
    prepare_streams()
    status = 1  # until the work is done
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is told once, as an error
            warnings.showwarning = _show_warning
            status = work()
        print(end="", flush=True)  # what cannot be written is found out here
    except InputError as error:
        print(f"{name}: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        from sdxl_ref.commands.memory import tell

        return tell(name, error)
    except OSError as error:  # standard output is full, or (a broken pipe) whoever read it has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"{name}: error:", error, file=sys.stderr)
            status = 1
    return status


def prepare_streams() -> None:
    """A stream may have been closed, and a file name may hold what a terminal cannot show."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
