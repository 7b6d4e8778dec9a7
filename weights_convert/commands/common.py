"""What the commands share: options, JSON, tables."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def add_reading_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--variant", help="of a folder's files: fp16 for names such as model.fp16.safetensors")
    p.add_argument("--json", action="store_true", help="for programs")


def add_target_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it is written")
    add_force_option(p)


def add_force_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--force", action="store_true", help="replace what is at the target")


def print_json(value: object) -> None:
    """With null for what JSON has no number for: NaN and infinity."""
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    print(json.dumps(strict, indent=1))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells, each column as wide as its longest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def first_of(names: Sequence[str], count: int) -> str:
    """The first few of a list in one line."""
    shown = ", ".join(names[:count])
    return f"{shown}, …" if len(names) > count else shown
