"""The jobs of a batch, from its list and the options that all of them share, in pieces that are done in one go."""

import argparse
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import Any, NamedTuple

from sdxl_ref.commands.job_options import COMMANDS, Options, arguments_of, name_of, products
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
        self.readers = {command: Options(command) for command in COMMANDS}
        self.errors: list[tuple[int, str]] = []
        self.entries: list[Entry] = []  # in the list's order
        self.twins = 0
        combinations = products(a.parser, a.over)
        names: set[str] = set()
        numbers: dict[Any, int] = {}
        for line in job_list.read(a.jobs):
            for over in combinations:
                try:
                    job, keys = self.read(line, over)
                except InputError as error:
                    self.errors.append((line.number, str(error)))
                    break
                if job.name in names:
                    self.twins += 1
                    continue
                names.add(job.name)
                model, kind = (numbers.setdefault(key, len(numbers)) for key in keys)
                self.entries.append(Entry(job, (model, kind)))

    def read(self, line: job_list.Line, over: Mapping[str, str]) -> tuple[Job, tuple[Any, Any]]:
        """The job of a line, and what its model and its kind are. InputError for what is wrong with it."""
        if line.error:
            raise InputError(line.error)
        given = (line.options, over) if over else (line.options,)
        arguments = arguments_of(self.readers, self.shared, given)
        keys = values(arguments, (*WEIGHTS, ADAPTERS)), kind_of(arguments)
        return Job(name_of(arguments), line.number, given), keys

    def pieces(self, size: int) -> list[list[Job]]:
        """At most so many jobs of one kind together; pieces of one model in a row. Equal lists have equal pieces."""
        return list(self.chunks(size))

    def chunks(self, size: int) -> Iterator[list[Job]]:
        for _, alike in groupby(sorted(self.entries, key=lambda entry: entry.order), lambda entry: entry.order):
            while chunk := [entry.job for entry in islice(alike, size)]:
                yield chunk
