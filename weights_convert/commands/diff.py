"""`weights-convert diff`: compare two, tensor by tensor, across layouts; status 1 where they differ."""

import argparse
from pathlib import Path

from weights_convert.commands.common import add_reading_options, first_of, print_json, print_table
from weights_convert.reports import Comparison, diff

SHOWN_NAMES = 5
SHOWN_DIFFERENCES = 40


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("first", type=Path, metavar="A")
    p.add_argument("second", type=Path, metavar="B")
    add_reading_options(p)


def run(a: argparse.Namespace) -> int:
    comparison = diff(a.first, a.second, a.variant)
    if a.json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)
    return 0 if comparison.is_same() else 1


def print_comparison(comparison: Comparison) -> None:
    """What differs, the furthest first."""
    print(f"{comparison.equal} tensors are equal, {len(comparison.different)} differ")
    for problem, names in comparison.mismatches.items():
        if names:
            print(f"{len(names)} {problem}: {first_of(names, SHOWN_NAMES)}")
    rows = [(d.key, f"{d.largest:.3g}", f"{d.relative:.3g}") for d in comparison.different[:SHOWN_DIFFERENCES]]
    if rows:
        print_table([("tensor", "largest", "relative"), *rows])
