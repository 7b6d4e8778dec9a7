"""Words of a command line that are not known, with the nearest one. Imported by `sdxl_ref.cli` when there is one."""

import argparse
import re
from collections.abc import Sequence

from sdxl_ref.config import nearest

INVALID_CHOICE = re.compile(r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<choices>.*)\)")


def with_hint(message: str) -> str:
    """A message of argparse, with the choice that was perhaps meant where it is about a choice."""
    choice = INVALID_CHOICE.search(message)
    hint = nearest(choice["word"], re.findall(r"[\w-]+", choice["choices"])) if choice else ""
    return message + hint


def unrecognized(command: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """The message for words that a command has no use for, with the option that the first was perhaps to be."""
    options = [option for action in command._actions for option in action.option_strings]
    hint = nearest(words[0].partition("=")[0], options)
    return f"unrecognized arguments: {' '.join(words)}{hint} (see {command.prog} --help)"
