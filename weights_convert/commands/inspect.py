"""`weights-convert inspect`: what a file or folder is: parts, sizes, dtypes, extras, VAE."""

import argparse

from sdxl_ref.weights.report import describe
from weights_convert.commands.common import add_reading_options, print_json


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="FILE|FOLDER")
    add_reading_options(p)


def run(a: argparse.Namespace) -> int:
    description = describe(a.path, a.variant)
    if a.json:
        print_json(description.to_json())
    else:
        print("\n".join(description.lines()))
    return 0
