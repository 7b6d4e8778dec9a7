"""`sdxl-ref batch`: a list of jobs for refine and generate: each done once, whatever stops it, to the same bits."""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from sdxl_ref.commands import common
from sdxl_ref.commands.job_options import Options, add_shared_options, name_of, products
from sdxl_ref.commands.worker import ADAPTERS, WEIGHTS, Job, Worker, kind_of, values
from sdxl_ref.config import InputError
from sdxl_ref.running import index_page, job_list
from sdxl_ref.running.record import Record
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.locking import locked

INTERRUPTED = 130  # as a shell has it of what Ctrl-C has ended
SHOWN = 20  # errors
EPILOG = """JOBS is a file of JSON lines, a table (.csv, .tsv) whose first line names the columns, or a folder of
pictures. A line has options of refine where it has an image, else of generate, by their long names with underscores:

  {"prompt": "a red barn at night", "seed": 3, "base": "sd_xl_base_1.0.safetensors"}
  {"image": "photo.jpg", "prompt": "a cup of coffee", "strength": 0.2, "checkpoint": "sd_xl_refiner_1.0.safetensors"}

What stands on the command line holds for all lines. A line's own value goes before it; of --lora and --embedding both
count. --over makes a job of each line with each value, or each combination of values, as in grid.

A picture is named by a hash of its job's options: equal lines are one job. record.jsonl in DIR says what is done; the
same command goes on after a stop of any kind. Exit status 2 where a line was bad, after all others are done; 130 after
Ctrl-C.
"""


class Entry(NamedTuple):
    """A job of the list: its name, the line, its value of each axis, and the numbers of its model and of its kind."""

    name: str
    line: job_list.Line
    over: dict[str, str]
    order: tuple[int, int]


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EPILOG
    p.add_argument("jobs", type=Path, metavar="JOBS", help="JSON lines, a table, or a folder of pictures")
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pictures, record and index.html; made if need be"
    )
    p.add_argument(
        "--over", nargs="+", default=[], metavar="NAME=V1,V2", help="an option and its values, for every line"
    )
    p.add_argument("--threads", type=int, help="of a CPU: the bits of a picture depend on it (all cores); recorded")
    p.add_argument("--batch-size", type=int, default=1, help="jobs of one size and model that are denoised together")
    p.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a picture's bits do not depend on what it is denoised with: each is evaluated by itself",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    add_shared_options(p)


OWN = ("jobs", "out", "over", "threads", "batch_size", "batch_invariant", "device", "command", "parser", "words")


def run(a: argparse.Namespace) -> int:
    jobs = Jobs(a)
    prepare(a, jobs)
    device = common.pick_device(a.device)
    with locked(a.out, f"another batch is at work in {a.out}: wait for its end, or use another folder"):
        clear(a.out)
        record = Record(a.out, {"threads": torch.get_num_threads(), "batch_invariant": a.batch_invariant})
        try:
            return Batch(a, jobs, record, device).run()
        finally:
            record.close()


def prepare(a: argparse.Namespace, jobs: "Jobs") -> None:
    """Make the folder, and fix the number of threads. InputError for options that no run can have."""
    for name in ("threads", "batch_size"):
        if getattr(a, name) is not None and not 1 <= getattr(a, name) <= 1024:
            raise InputError(f"--{name.replace('_', '-')} must be from 1 to 1024, found {getattr(a, name)}")
    if a.out.resolve() == a.jobs.resolve():
        raise InputError(f"--out is the folder of the pictures that are read, {a.jobs}: use another one")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"could not make the folder {a.out}: {error.strerror}") from error


class Jobs:
    """What the list and the options say: `entries`, those of one model one after the other, and `errors`."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.shared = {name: value for name, value in vars(a).items() if name not in OWN}
        self.shared["device"] = a.device
        self.options = {command: Options(command) for command in ("refine", "generate")}
        self.errors: list[tuple[int, str]] = []
        self.entries: list[Entry] = []
        self.twins = 0
        combinations = products(a.parser, a.over)
        names: set[str] = set()
        numbers: dict[Any, int] = {}
        for line in job_list.read(a.jobs):
            for over in combinations:
                try:
                    if line.error:
                        raise InputError(line.error)
                    arguments = self.arguments(line, over)
                except InputError as error:
                    self.errors.append((line.number, str(error)))
                    break
                name = name_of(arguments)
                if name in names:
                    self.twins += 1
                    continue
                names.add(name)
                keys = values(arguments, (*WEIGHTS, ADAPTERS)), kind_of(arguments)
                model, kind = (numbers.setdefault(key, len(numbers)) for key in keys)
                self.entries.append(Entry(name, line, over, (model, kind)))

    def arguments(self, line: job_list.Line, over: dict[str, str]) -> argparse.Namespace:
        """Those of the command of a line. InputError for what is wrong with it."""
        command = "refine" if line.options.get("image") is not None else "generate"
        return self.options[command].arguments(self.shared, line.options, over)

    def chunks(self, size: int) -> Iterator[list[Entry]]:
        """Jobs of one kind together, at most so many, however many of them are done: those of one model in a row."""
        for _, alike in groupby(sorted(self.entries, key=lambda entry: entry.order), lambda entry: entry.order):
            while chunk := list(islice(alike, size)):
                yield chunk


class Batch:
    """The jobs of a list that are not done yet, until they are."""

    def __init__(self, a: argparse.Namespace, jobs: Jobs, record: Record, device: torch.device) -> None:
        self.a = a
        self.jobs = jobs
        self.record = record
        self.worker = Worker(record, device, a.batch_invariant)
        self.failed: list[tuple[int, str]] = []

    def run(self) -> int:
        files = set(os.listdir(self.a.out))
        done = {entry.name for entry in self.jobs.entries if self.record.is_done(entry.name, files)}
        total = len(self.jobs.entries)
        twins = f", {self.jobs.twins} more are equal to one of them" if self.jobs.twins else ""
        bad = f", {len(self.jobs.errors)} bad lines" if self.jobs.errors else ""
        threads = torch.get_num_threads()
        print(f"batch: {total} jobs{twins}{bad}; {len(done)} done before; {threads} threads", flush=True)
        try:
            with tqdm(total=total, initial=len(done), unit="job", disable=None) as bar:
                for chunk in self.jobs.chunks(self.a.batch_size):
                    self.work(chunk, done, bar)
        except KeyboardInterrupt:
            print(f"sdxl-ref: stopped: {len(done)} of {total} jobs are done; the same command goes on", file=sys.stderr)
            return INTERRUPTED
        return self.finish(len(done))

    def work(self, chunk: list[Entry], done: set[str], bar: Any) -> None:
        """Do what of a chunk is not done; where a picture depends on its neighbours, all of it."""
        missing = [entry for entry in chunk if entry.name not in done]
        if missing and not self.a.batch_invariant:
            missing = chunk
        entries = {entry.name: entry for entry in missing}
        todo = [Job(entry.name, entry.line.number, {**entry.line.options, **entry.over}) for entry in missing]

        def arguments_of(job: Job) -> argparse.Namespace:
            return self.jobs.arguments(entries[job.name].line, entries[job.name].over)

        for job, error in self.worker.work(todo, arguments_of):
            if error:
                self.failed.append((job.line, error))
                bar.write(f"line {job.line}: {error}", file=sys.stderr)
            elif job.name not in done:
                done.add(job.name)
                bar.update()

    def finish(self, count: int) -> int:
        """Write the page, say what was not done, and return the exit status."""
        failures = [f"line {line}: {error}" for line, error in sorted(self.jobs.errors + self.failed)]
        made = self.record.done
        shown = ((made[e.name], {**e.line.options, **e.over}) for e in self.jobs.entries if e.name in made)
        page = self.a.out / "index.html"
        index_page.write(page, shown, count, failures)
        print(f"wrote {count} of {len(self.jobs.entries)} jobs to {self.a.out}, see {page}")
        for failure in failures[:SHOWN]:
            print(f"sdxl-ref: error: {failure}", file=sys.stderr)
        if len(failures) > SHOWN:
            print(f"sdxl-ref: error: and {len(failures) - SHOWN} more: {page} has all", file=sys.stderr)
        return 2 if failures else 0
