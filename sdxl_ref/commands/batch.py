"""`sdxl-ref batch`: a list of jobs for refine and generate: each done once, whatever stops it, to the same bits."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from sdxl_ref.commands.job_options import add_shared_options
from sdxl_ref.commands.jobs import Jobs
from sdxl_ref.commands.worker import Settings, Worker
from sdxl_ref.config import InputError
from sdxl_ref.running import index_page
from sdxl_ref.running.ranks import Ranks, join
from sdxl_ref.running.record import Record
from sdxl_ref.training.processes import is_lost_process
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.locking import locked

INTERRUPTED = 130  # as a shell has it of what Ctrl-C has ended
SHOWN = 20  # errors
SHARD = re.compile(r"(?P<number>\d{1,6})/(?P<count>\d{1,6})")
EPILOG = """JOBS is a file of JSON lines, a table (.csv, .tsv) whose first line names the columns, a folder of pictures,
or a tar as webdataset writes it (of each name .json with options, .txt with the prompt, and a picture). A line has
options of refine where it has an image, else of generate, by their long names with underscores:

  {"prompt": "a red barn at night", "seed": 3, "base": "sd_xl_base_1.0.safetensors"}
  {"image": "photo.jpg", "prompt": "a cup of coffee", "strength": 0.2, "checkpoint": "sd_xl_refiner_1.0.safetensors"}

What stands on the command line holds for all lines. A line's own value goes before it; of --lora and --embedding both
count. --over makes a job of each line with each value, or each combination of values, as in grid.

A picture is named by a hash of its job's options: equal lines are one job. record.jsonl in DIR says what is done; the
same command goes on after a stop of any kind, on any number of processes:

  torchrun --nproc-per-node 4 -m sdxl_ref batch jobs.jsonl --out DIR …    --max-restarts 3: as often anew
  sdxl-ref batch jobs.jsonl --out DIR --shard $SLURM_ARRAY_TASK_ID/100 …  one of 100 that know nothing of each other
  sdxl-ref batch jobs.jsonl --out DIR --ray auto …                        through Ray Data

Exit status 2 where a line was bad, after all others are done; 130 after
Ctrl-C.
"""


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EPILOG
    p.add_argument("jobs", type=Path, metavar="JOBS", help="JSON lines, a table, a folder of pictures, or a tar")
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pictures, record and index.html; made if need be"
    )
    p.add_argument(
        "--over", nargs="+", default=[], metavar="NAME=V1,V2", help="an option and its values, for every line"
    )
    p.add_argument(
        "--threads", type=int, help="of a CPU, on which the bits depend: recorded (all cores; 1 of several processes)"
    )
    p.add_argument("--batch-size", type=int, default=1, help="jobs of one size and model that are denoised together")
    p.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a picture's bits do not depend on what it is denoised with: each is evaluated by itself",
    )
    p.add_argument("--shard", metavar="I/N", help="do the part I of N, from 0 on, of the same list: for job arrays")
    p.add_argument(
        "--lease", type=float, default=120.0, help="seconds after which what a silent rank had is drawn anew"
    )
    p.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="by Ray's actors: here, or on a cluster")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    add_shared_options(p)


OWN = ("jobs", "out", "over", "threads", "batch_size", "batch_invariant", "shard", "lease", "ray")
NEVER_SHARED = (*OWN, "command", "parser", "words")


def run(a: argparse.Namespace) -> int:
    check(a)
    jobs = Jobs(a, {name: value for name, value in vars(a).items() if name not in NEVER_SHARED})
    ranks = join(a.lease)
    if ranks is not None and (a.ray is not None or a.shard):
        raise InputError("torchrun's processes share the jobs by themselves: leave --shard and --ray out")
    try:
        with alone_in(a, ranks):
            settings = Settings(a.out, jobs.shared, device_of(a, ranks), threads_of(a, ranks), a.batch_invariant)
            return Batch(a, jobs, settings, ranks).run()
    except Exception as error:
        if ranks is None or not is_lost_process(error):
            raise
        raise InputError(
            "another process of the batch has ended: what is done is kept, the same command goes on"
        ) from error


def check(a: argparse.Namespace) -> None:
    """InputError for options that no batch can have."""
    for name in ("threads", "batch_size"):
        if getattr(a, name) is not None and not 1 <= getattr(a, name) <= 1024:
            raise InputError(f"--{name.replace('_', '-')} must be from 1 to 1024, found {getattr(a, name)}")
    if not 1 <= a.lease <= 86_400:
        raise InputError(f"--lease must be from 1 to 86400 seconds, found {a.lease:g}")
    if a.out.resolve() == a.jobs.resolve():
        raise InputError(f"--out is the folder of the pictures that are read, {a.jobs}: use another one")
    if a.shard and a.ray is not None:
        raise InputError("--shard and --ray both say who does which job: give one of them")
    shard_of(a)


def shard_of(a: argparse.Namespace) -> tuple[int, int]:
    """Which part of how many. InputError for anything but I/N with I below N."""
    match = SHARD.fullmatch(a.shard or "0/1")
    if not match or int(match["number"]) >= int(match["count"]):
        raise InputError(f"--shard must be I/N, with I from 0 to N - 1, found {a.shard!r:.40}")
    return int(match["number"]), int(match["count"])


def device_of(a: argparse.Namespace, ranks: Ranks | None) -> str:
    """Of several processes on a machine each has a GPU of its own."""
    if ranks is not None and a.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{ranks.local_rank}"
    return str(a.device)


def threads_of(a: argparse.Namespace, ranks: Ranks | None) -> int:
    """As asked for, as the batch began, or else all cores, and 1 where there are several processes."""
    begun = Record(a.out).settings.get("threads")
    usual = torch.get_num_threads() if ranks is None and a.ray is None else 1
    return a.threads or (begun if isinstance(begun, int) else usual)


@contextmanager
def alone_in(a: argparse.Namespace, ranks: Ranks | None) -> Iterator[None]:
    """The folder is there, nobody else does the same in it, and what killed processes left in it is gone."""
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"could not make the folder {a.out}: {error.strerror}") from error
    if ranks is not None and not ranks.leads:
        ranks.wait_for("begun")
        yield
        return
    number, count = shard_of(a)
    lock = f".lock-{number}-of-{count}" if a.shard else ".lock"
    with locked(a.out, f"another batch is at work in {a.out}: wait for its end, or use another folder", lock):
        if not a.shard:
            clear(a.out)
        if ranks is not None:
            ranks.say("begun")
        yield


class Batch:
    """The jobs of a list that are not done yet, until they are."""

    def __init__(self, a: argparse.Namespace, jobs: Jobs, settings: Settings, ranks: Ranks | None) -> None:
        self.a = a
        self.jobs = jobs
        self.settings = settings
        self.ranks = ranks
        self.record = Record(a.out)
        number, count = shard_of(a)
        self.pieces = jobs.pieces(a.batch_size)[number::count]
        self.missing = {job.name for piece in self.pieces for job in piece if not self.record.is_done(job.name)}

    @property
    def leads(self) -> bool:
        return self.ranks is None or self.ranks.leads

    def run(self) -> int:
        total = sum(map(len, self.pieces))
        if self.leads:
            twins = f", {self.jobs.twins} more are equal to one of them" if self.jobs.twins else ""
            bad = f", {len(self.jobs.errors)} bad lines" if self.jobs.errors else ""
            before = f"{total - len(self.missing)} done before"
            print(f"batch: {total} jobs{twins}{bad}; {before}; {self.settings.threads} threads", flush=True)
        begun = total - len(self.missing)
        try:
            with tqdm(total=total, initial=begun, unit="job", disable=None if self.leads else True) as bar:
                for count in self.on_ray() if self.a.ray is not None else self.here():
                    bar.n = total - len(self.missing) if self.ranks is None else begun + self.ranks.tell(count)
                    bar.refresh()
        except KeyboardInterrupt:
            self.record.refresh()
            done = sum(self.record.is_done(job.name) for piece in self.pieces for job in piece)
            print(f"sdxl-ref: stopped: {done} of {total} jobs are done; the same command goes on", file=sys.stderr)
            return INTERRUPTED
        return self.finish() if self.leads else 0

    def here(self) -> Iterator[int]:
        """Do pieces in this process; yields how many jobs each has added to what is done."""
        number, count = shard_of(self.a)
        name = f"rank-{self.ranks.rank}" if self.ranks else f"shard-{number}-of-{count}" if self.a.shard else ""
        drawn = range(len(self.pieces)) if self.ranks is None else self.ranks.draw(len(self.pieces))
        with closing(Worker(self.settings, name)) as worker:
            for i in drawn:
                before = len(self.missing)
                for job, error in worker.work(self.pieces[i]):
                    if error:
                        tqdm.write(f"line {job.line}: {error}", file=sys.stderr)
                    else:
                        self.missing.discard(job.name)
                yield before - len(self.missing)

    def on_ray(self) -> Iterator[int]:
        from sdxl_ref.commands.on_ray import done_on_ray

        open_pieces = [piece for piece in self.pieces if any(job.name in self.missing for job in piece)]
        lines = {job.name: job.line for piece in open_pieces for job in piece}
        for outcomes in done_on_ray(open_pieces, self.settings, self.a.ray) if open_pieces else ():
            for name, error in outcomes:
                if error:
                    tqdm.write(f"line {lines[name]}: {error}", file=sys.stderr)
                else:
                    self.missing.discard(name)
            yield sum(not error for _, error in outcomes)

    def finish(self) -> int:
        """Write the page, say what was not done, and return the exit status."""
        self.record.refresh()
        own = {job.name for piece in self.pieces for job in piece}
        jobs = [entry.job for entry in self.jobs.entries]
        made = {job.name for job in jobs if self.record.is_done(job.name)}
        missing = [job for job in jobs if job.name in own - made]
        lost = [(job.line, self.record.failed.get(job.name, "not done")) for job in missing]
        failures = [f"line {line}: {error}" for line, error in sorted(self.jobs.errors + lost)]
        shown = [job for job in jobs if job.name in made]
        page = self.a.out / "index.html"
        index_page.write(page, ((self.record.done[job.name], job.options) for job in shown), len(shown), failures)
        print(f"wrote {len(own) - len(lost)} of {len(own)} jobs to {self.a.out}, see {page}")
        for failure in failures[:SHOWN]:
            print(f"sdxl-ref: error: {failure}", file=sys.stderr)
        if len(failures) > SHOWN:
            print(f"sdxl-ref: error: and {len(failures) - SHOWN} more: {page} has all", file=sys.stderr)
        return 2 if failures else 0
