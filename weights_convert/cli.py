"""The command line: `weights-convert COMMAND`, in the frame of `sdxl-ref`.

A command is a module of `weights_convert.commands`. Exit status 0 on success, 2 with one line for bad input, 1 where a
check does not hold, and for anything else.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdxl_ref import __version__
from sdxl_ref.cli import Parser, add_commands, module_of, run

NAME = "weights-convert"
COMMANDS = Path(__file__).parent / "commands"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        arguments = parser(words).parse_args(words)
        return int(module_of("weights_convert", arguments.command).run(arguments))

    return run(NAME, work, stopped="stopped; nothing is at the target that was not there before")


def parser(words: Sequence[str]) -> Parser:
    """All commands by name, and the options of the one that the words begin with."""
    top = Parser(prog=NAME, description="SDXL weights: look into them, move them between layouts.")
    top.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    add_commands(top, COMMANDS, words)
    return top
