"""`weights-convert diff`: compare two, tensor by tensor, across layouts; status 1 where they differ."""

import argparse
from contextlib import suppress
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
    with suppress(BrokenPipeError):  # who reads may have seen enough
        if a.json:
            print_json(comparison.to_json())
        else:
            print_comparison(comparison)
    return 0 if comparison.is_same() else 1


def print_comparison(comparison: Comparison) -> None:
    """What is equal in one line, what differs in dtype alone, and what differs in values, the furthest first."""
    print(f"{comparison.equal} tensors are equal, {len(comparison.different)} differ")
    by_dtype_alone = {key for names in comparison.dtype_alone.values() for key in names}
    for problem, names in comparison.mismatches.items():
        others = [name for name in names if name not in by_dtype_alone]
        if others:
            print(f"{len(others)} {problem}: {first_of(others, SHOWN_NAMES)}")
    for dtypes, names in comparison.dtype_alone.items():
        print(f"{len(names)} of another dtype alone ({dtypes}): {first_of(names, SHOWN_NAMES)}")
    shown = comparison.different[:SHOWN_DIFFERENCES]
    rows = [(d.key, f"{d.relative:.3g}", f"{d.largest:.3g}") for d in shown]
    if rows:
        print_table([("tensor", "relative", "largest"), *rows])
    if len(comparison.different) > len(shown):
        print(f"and {len(comparison.different) - len(shown)} others, which differ less")
