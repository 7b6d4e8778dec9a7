"""The command line. Exit status 0 on success, 2 with one line for bad input, 1 for anything else."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from sdxl_ref import __version__
from sdxl_ref.config import InputError

COMMANDS = {  # each a module of sdxl_ref.commands with `arguments(parser)` and `run(arguments)`
    "demo": "paint a few prompts with the small pair that is installed, and refine a blurred scene",
    "refine": "refine a picture under a prompt",
    "generate": "make pictures from a prompt: base, ensemble of experts, or two stages",
    "train": "fine-tune a base or a refiner on a folder of pictures: a LoRA, or the whole UNet",
    "evaluate": "measure a base and a refiner that paint scenes",
    "fetch": "download an official file and check its hash",
    "info": "tell what a checkpoint is",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is False or action.default in (None, "")  # 0 is told
        return action.help if silent else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (it may have been closed)
    for stream in (sys.stdout, sys.stderr):  # a file name may hold what the terminal cannot show
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    top = Parser(prog="sdxl-ref", description="Stable Diffusion XL's refiner, and the system around it.")
    top.add_argument("--version", action="version", version=f"sdxl-ref {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    try:
        for name, summary in COMMANDS.items():
            parser = commands.add_parser(name, help=summary, description=summary, formatter_class=Help)
            if name in words[:1]:  # only the command that runs is imported
                import_module(f"sdxl_ref.commands.{name}").arguments(parser)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is told once, as an error
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            arguments = top.parse_args(words)
            import_module(f"sdxl_ref.commands.{arguments.command}").run(arguments)
        print(end="", flush=True)  # what cannot be written is found out here
    except InputError as error:
        print("sdxl-ref: error:", re.sub(r"[^ -~\u00a0-\U0010ffff]+", " ", str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdxl-ref: stopped", file=sys.stderr)
        return 1
    except OSError as error:  # standard output is full, or (a broken pipe) whoever read it has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print("sdxl-ref: error:", error, file=sys.stderr)
        return 1
    return 0
