"""The jobs of a batch, from its list and the options that all of them share, in pieces that are done in one go."""

import argparse
from collections.abc import Mapping
from itertools import groupby, islice
from typing import Any, NamedTuple

from sdxl_ref.commands.job_options import COMMANDS, OWN, Options, arguments_of, digest_of, name_of, products
from sdxl_ref.commands.worker import ADAPTERS, WEIGHTS, Job, kind_of, values
from sdxl_ref.config import InputError
from sdxl_ref.running import job_list


class Entry(NamedTuple):
    """A job, and the numbers of its model and of its kind, by which it is put beside others."""

    job: Job
    order: tuple[int, int]


class Jobs:
    """What a list and the options say. `errors`: of lines that are no jobs; `twins`: how many are equal to another."""

    def __init__(self, a: argparse.Namespace, shared: Mapping[str, Any]) -> None:
        self.shared = shared
        self.readers = {command: Options(command, shared) for command in COMMANDS}
        self.kinds: dict[str, tuple[str, tuple[int, int]]] = {}  # by the options that are not a job's own
        self.numbers: dict[Any, int] = {}  # of models and of kinds
        self.errors: list[tuple[int, str]] = []
        self.entries: list[Entry] = []  # in the list's order
        self.twins = 0
        combinations = products(a.parser, a.over)
        names: set[str] = set()
        for line in job_list.read(a.jobs):
            for over in combinations:
                try:
                    job, order = self.read(line, over)
                except InputError as error:
                    self.errors.append((line.number, str(error)))
                    if line.error:
                        break
                    continue
                if job.name in names:
                    self.twins += 1
                    continue
                names.add(job.name)
                self.entries.append(Entry(job, order))

    def read(self, line: job_list.Line, over: Mapping[str, str]) -> tuple[Job, tuple[int, int]]:
        """The job of a line, and the numbers of its model and its kind. InputError for what is wrong with it."""
        if line.error:
            raise InputError(line.error)
        given = (line.options, over) if over else (line.options,)
        arguments = arguments_of(self.readers, given)
        others = [(name, value) for options in given for name, value in options.items() if name not in OWN]
        lacks = tuple(getattr(arguments, name, None) is None for name in OWN)
        key = repr((arguments.command, lacks, others))
        if key not in self.kinds:
            keys = values(arguments, (*WEIGHTS, ADAPTERS)), kind_of(arguments)
            model, kind = (self.numbers.setdefault(key, len(self.numbers)) for key in keys)
            self.kinds[key] = digest_of(arguments), (model, kind)
        digest, order = self.kinds[key]
        return Job(name_of(digest, arguments), line.number, given), order

    def pieces(self, size: int) -> list[list[Job]]:
        """At most so many jobs of one kind together; pieces of one model in a row. Equal lists have equal pieces."""
        pieces = []
        for _, alike in groupby(sorted(self.entries, key=lambda entry: entry.order), lambda entry: entry.order):
            while piece := [entry.job for entry in islice(alike, size)]:
                pieces.append(piece)
        return pieces
