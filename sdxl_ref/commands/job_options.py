"""What a job of a batch says: the options of refine or generate, each read as on their command line."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import product
from typing import Any

from sdxl_ref.commands import generate, refine
from sdxl_ref.commands.axes import SWITCH, WITHOUT, words_of
from sdxl_ref.config import InputError, nearest
from sdxl_ref.pipelines.recording import PROMPTS

OF_ALL = ("device", "compile", "plain", "low_memory")  # options that a batch has once, for all of its jobs
RESULTS = ("out", "save_latents")
OWN = (*PROMPTS, "seed", "image", "mask")  # in which jobs differ that can be done together
COMMANDS: dict[str, Any] = {"refine": refine, "generate": generate}


class Options:
    """The options of one of the commands: how each is read, its default, and what all jobs of a batch share."""

    def __init__(self, command: str, shared: Mapping[str, Any]) -> None:
        self.parser = argparse.ArgumentParser(prog=command, add_help=False)
        COMMANDS[command].arguments(self.parser)
        self.actions = {action.dest: action for action in self.parser._actions}
        self.usable = [name for name in self.actions if name not in (*OF_ALL, "out")]
        self.required = [name for name, action in self.actions.items() if action.required]
        self.misplaced = [name for name in shared if name not in self.actions]
        defaults = {name: self.parser.get_default(name) for name in self.actions}
        self.values = {**defaults, **shared, "command": command}

    def arguments(self, *given: Mapping[str, Any]) -> argparse.Namespace:
        """The command's arguments: its defaults, those that all jobs share, then the job's own, the last one first.

        Of an option that may be repeated all values count. InputError for what is no option, or no value of one.
        """
        for name in self.misplaced:
            raise InputError(f"--{name.replace('_', '-')} is of no use to a job of {self.parser.prog}: leave it out")
        values = dict(self.values)
        for options in given:
            for name, value in options.items():
                action = self.action(name)
                if value is not None:
                    read = value_of(self.parser, action, value)
                    repeats = isinstance(action, argparse._AppendAction)
                    values[action.dest] = [*values[action.dest], *read] if repeats else read
        for name in self.required:
            if values[name] is None:
                raise InputError(f"expected {name}, found none: give it in the list, or for all jobs by --{name}")
        arguments = argparse.Namespace()
        vars(arguments).update(values)
        return arguments

    def action(self, name: str) -> argparse.Action:
        known = name.replace("-", "_")
        if known == "out":
            raise InputError(f"{name}: a batch names its pictures itself, in the folder of its own --out")
        if known in OF_ALL and known in self.actions:
            raise InputError(f"{name} is the same for all jobs: give it on the command line")
        if known not in self.usable:
            raise InputError(f"unknown option {name!r} of {self.parser.prog}{nearest(known, self.usable)}")
        return self.actions[known]


def arguments_of(readers: Mapping[str, Options], given: Sequence[Mapping[str, Any]]) -> argparse.Namespace:
    """Those of a job: of refine where it has an image, else of generate. InputError as of `Options.arguments`."""
    has_image = any(options.get("image") is not None for options in given)
    return readers["refine" if has_image else "generate"].arguments(*given)


def value_of(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """What an option makes of a value of a line: text as on the command line, or a number, true, false or a list."""
    name = action.dest
    if action.nargs == 0:
        if str(value).lower() not in SWITCH:
            raise InputError(f"{name}: expected true or false, found {value!r:.60}")
        return SWITCH[str(value).lower()]
    if isinstance(action, argparse._AppendAction):
        return [read(parser, action, one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and action.metavar == "LIST|FILE":
        if not value or not all(type(number) in (int, float) for number in value):
            raise InputError(f"{name}: expected numbers, found {value!r:.60}")
        value = ",".join(map(repr, value))
    return read(parser, action, value)


def read(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """One value, by what the command line reads it with."""
    is_number = type(value) in (int, float)
    if not (isinstance(value, str) or (is_number and action.type is not None)):
        raise InputError(f"{action.dest}: expected {'text' if action.type is None else 'a value'}, found {value!r:.60}")
    if action.dest == "seed" and str(value).strip() == "-1":
        raise InputError("seed: a batch needs one that stays, so that a job can be made again: expected 0 or more")
    try:
        converted = parser._get_value(action, value if isinstance(value, str) else repr(value))
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        raise InputError(f"{action.dest}: {error.message}") from error
    return converted


def add_shared_options(p: argparse.ArgumentParser) -> None:
    """Every option of both commands; only those that are given become arguments."""
    own = {action.dest for action in p._actions}
    for command in COMMANDS:
        for action in Options(command, {}).actions.values():
            if action.option_strings and action.dest not in (*own, *RESULTS):
                shared = copy(action)
                shared.default = argparse.SUPPRESS
                shared.required = False
                p._add_action(shared)
                own.add(action.dest)


def products(parser: argparse.ArgumentParser, texts: Sequence[str]) -> list[dict[str, str]]:
    """Of `NAME=V1,V2` every combination of values, the last name fastest; of nothing the one that says nothing."""
    names = []
    values = []
    for text in texts:
        name, equals, words = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        actions = {action.dest: action for action in parser._actions if action.option_strings}
        if not equals or name not in actions:
            raise InputError(f"--over expects NAME=V1,V2 with the name of an option, found {text!r:.80}")
        if name in names:
            raise InputError(f"--over has {name} twice: give all its values at once")
        names.append(name)
        values.append(words_of(actions[name], words))
    rows = [dict(zip(names, row, strict=True)) for row in product(*values)]
    return [{name: word for name, word in row.items() if word != WITHOUT} for row in rows]


def digest_of(arguments: argparse.Namespace) -> str:
    """A hash of all that pictures depend on and that is not each job's own."""
    names = sorted(vars(arguments).keys() - {*OF_ALL, *RESULTS, *OWN})
    return hashed([(name, getattr(arguments, name)) for name in names])


def name_of(digest: str, arguments: argparse.Namespace) -> str:
    """A name for a job, from that hash and what is its own: equal jobs have equal names."""
    return hashed([digest, *(getattr(arguments, name, None) for name in OWN)])[:16]


def hashed(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()
