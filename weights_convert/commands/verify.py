"""`weights-convert verify`: keys, shapes, hashes, finite values; status 1 where one does not hold."""

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from weights_convert.commands.common import add_reading_options, print_json, print_table
from weights_convert.reports import verify


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=Path, metavar="FILE|FOLDER")
    add_reading_options(p)


def run(a: argparse.Namespace) -> int:
    verdicts = verify(a.path, a.variant)
    with suppress(BrokenPipeError):  # who reads may have seen enough
        if a.json:
            print_json([asdict(verdict) for verdict in verdicts])
        else:
            rows = [(verdict.check, "yes" if verdict.holds else "NO", verdict.found) for verdict in verdicts]
            print_table([("check", "holds", "found"), *rows])
    return 0 if all(verdict.holds for verdict in verdicts) else 1
