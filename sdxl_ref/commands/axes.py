"""The axes of a grid, `NAME=VALUE,VALUE`: options of a command, and what its own parser makes of each value."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_ref.config import InputError, nearest

FOR_ALL = ("out", "device", "compile", "low_memory")  # options of a grid as a whole
NO_USE = ("save_latents", "num_images")  # and those that it has no use for
FILES = ("MODEL", "FILE", "FILE[:SCALE]")  # metavars of options whose values are paths
WITHOUT = "none"  # a value that sets nothing
SWITCH = {"true": True, "false": False}
MOST_CELLS = 10_000


class Value(NamedTuple):
    """What stands on the label, and the arguments that it sets."""

    label: str
    arguments: dict[str, Any]


class Axis(NamedTuple):
    name: str
    values: Sequence[Value]


class Cell(NamedTuple):
    """A place of the grid, its value of each axis, and its own command's arguments."""

    row: int
    column: int
    values: Mapping[str, str]
    arguments: argparse.Namespace

    @property
    def place(self) -> tuple[int, int]:
        return self.row, self.column

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.60}" for name, value in self.values.items())


def named(words: Sequence[str]) -> set[str]:
    """What the words of a command line name with `=` behind it, as arguments are called."""
    return {word.partition("=")[0].replace("-", "_") for word in words if "=" in word}


def axes_of(p: argparse.ArgumentParser, a: argparse.Namespace, texts: Sequence[str]) -> list[Axis]:
    """Read the axes. InputError for a name that is no option, and what the option itself says of a value."""
    for action in p._actions:
        action.required = False  # one option at a time is parsed from here on
    axes = [axis_of(p, a, text) for text in texts]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--over has {name} twice: give all its values at once")
    count = prod(len(axis.values) for axis in axes)
    if count > MOST_CELLS:
        raise InputError(f"expected at most {MOST_CELLS:,} pictures in a grid, found {count:,}: give fewer values")
    return axes


def axis_of(p: argparse.ArgumentParser, a: argparse.Namespace, text: str) -> Axis:
    name, equals, values = text.partition("=")
    if not equals:
        raise InputError(
            f"--over expects NAME=VALUE,VALUE, found {text!r} (a picture comes first: grid PICTURE --over …)"
        )
    name = name.strip().lstrip("-").replace("_", "-")
    options = {action.dest.replace("_", "-"): action for action in p._actions if action.option_strings}
    usable = [option for option in options if option.replace("-", "_") not in (*FOR_ALL, *NO_USE, "help", "over")]
    if name.replace("-", "_") in (*FOR_ALL, *NO_USE):
        raise InputError(f"--{name} is no axis: a grid has one for all its pictures, or none")
    if name not in usable:
        raise InputError(f"--over: unknown option {name!r}{nearest(name, usable)} (see {p.prog} --help)")
    action = options[name]
    found = [Value(word, arguments_of(p, a, action, word)) for word in words_of(action, values)]
    return Axis(name, labelled(action, found))


def words_of(action: argparse.Action, values: str) -> list[str]:
    """The values of an option, separated by commas, or by | where there is one; lists by | alone."""
    return values.split("|" if "|" in values or action.metavar == "LIST|FILE" else ",")


def arguments_of(
    p: argparse.ArgumentParser, a: argparse.Namespace, action: argparse.Action, word: str
) -> dict[str, Any]:
    """What an option with this value sets. An option that may be repeated is one more than there are."""
    if word == WITHOUT:
        return {}
    flag = max(action.option_strings[:1])
    if action.nargs == 0:
        if word not in SWITCH:
            raise InputError(f"{flag} over {word!r}: expected true, false or {WITHOUT}")
        return {action.dest: SWITCH[word]}
    parsed, _ = p.parse_known_args([f"{flag}={word}"], argparse.Namespace(**vars(a)))
    return {action.dest: getattr(parsed, action.dest)}


def labelled(action: argparse.Action, values: Sequence[Value]) -> list[Value]:
    """With labels as short as can be: of files their names, where these differ; of a seed, the one that was drawn."""
    labels = [value.label for value in values]
    if action.dest == "seed":
        labels = [str(value.arguments.get("seed", value.label)) for value in values]
    if action.metavar in FILES:
        names = [Path(label).name for label in labels]
        labels = names if len(set(names)) == len(set(labels)) else labels
    return [Value(label, value.arguments) for label, value in zip(labels, values, strict=True)]


def rows_of(axes: Sequence[Axis]) -> list[Sequence[Value]]:
    """The values of all axes but the first, row by row; the last one changes from each row to the next."""
    return list(product(*(axis.values for axis in axes[1:])))


def cells_of(axes: Sequence[Axis], a: argparse.Namespace) -> Iterator[Cell]:
    """Row by row. The first axis runs across, the others down."""
    names = [axis.name for axis in axes]
    for row, others in enumerate(rows_of(axes)):
        for column, value in enumerate(axes[0].values):
            values = (value, *others)
            arguments = argparse.Namespace(**vars(a))
            for one in values:
                vars(arguments).update(one.arguments)
            labels = {name: one.label for name, one in zip(names, values, strict=True)}
            yield Cell(row, column, labels, arguments)
