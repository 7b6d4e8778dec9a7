"""`weights-convert inspect`: what a file or folder is: a model, a part of one or an adapter; sizes, dtypes, extras."""

import argparse
from contextlib import suppress

from sdxl_ref.adapters.report import describe_any
from weights_convert.commands.common import add_reading_options, print_json


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="FILE|FOLDER")
    add_reading_options(p)


def run(a: argparse.Namespace) -> int:
    description = describe_any(a.path, a.variant)
    with suppress(BrokenPipeError):  # who reads may have seen enough
        if a.json:
            print_json(description.to_json())
        else:
            print("\n".join(description.lines()))
    return 0
