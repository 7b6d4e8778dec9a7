"""What paints the jobs of a batch: it keeps its models for as long as the next jobs want the same ones."""

import argparse
import gc
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_ref.commands import common
from sdxl_ref.commands.job_options import COMMANDS, OWN, Options, arguments_of
from sdxl_ref.commands.memory import SIGNS
from sdxl_ref.config import InputError
from sdxl_ref.pipelines.recording import PROMPTS
from sdxl_ref.pipelines.request import Request
from sdxl_ref.running.record import Record

MODELS = ("command", "checkpoint", "base", "refiner", "variant", "vae")  # arguments by which files are opened
WEIGHTS = (*MODELS, "dtype", "vae_dtype", "prediction", "embedding", "low_memory", "compile", "plain")
ADAPTERS = "lora"
NO_MEMORY = "memory is not enough for it: ask for less, as --dtype bfloat16, a smaller picture, --tile or --low-memory"


class Job(NamedTuple):
    """A job by its name, with the number of its line, and the options that are its own, the last ones first."""

    name: str
    line: int
    given: Sequence[Mapping[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for options in self.given for name, value in options.items()}


class Outcome(NamedTuple):
    """A job that is done, or why it could not be."""

    job: Job
    error: str = ""


class Settings(NamedTuple):
    """What holds for all jobs of a batch: the folder, options given once, and what a picture's bits depend on."""

    folder: Path
    shared: Mapping[str, Any]
    device: str
    threads: int
    batch_invariant: bool = True

    def recorded(self) -> dict[str, Any]:
        return {"threads": self.threads, "batch_invariant": self.batch_invariant}


class Opened(NamedTuple):
    """A pipeline with its weights, and what a picture's settings say of these and of packing."""

    pipe: Any
    identities: Sequence[dict[str, Any]]
    settings: dict[str, Any]


class Planned(NamedTuple):
    """A job that only weights are missing of: its command's own job, and its arguments."""

    job: Job
    arguments: argparse.Namespace
    run: Any


class Worker:
    """Paints jobs into a folder and notes them in a record of its own, which `name` tells from those of others.

    None is a name that nobody else has. InputError where the record is of a batch with other settings, or where the
    device is not to be had.
    """

    def __init__(self, settings: Settings, name: str | None = "") -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = common.pick_device(settings.device)
        self.readers = {command: Options(command, settings.shared) for command in COMMANDS}
        self.kept: dict[str, tuple[Any, Any]] = {}  # the last value of each kind, with what it was made of
        self.record = Record(settings.folder, f"actor-{uuid.uuid4().hex[:12]}" if name is None else name)
        self.record.begin(settings.recorded())

    def work(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Do the jobs that nobody has done; each is yielded when its pictures are there, or with what is wrong.

        Without `batch_invariant` all of them where one is missing: a picture depends on what it is denoised with.
        InputError where nothing more can be written.
        """
        self.record.refresh()
        missing = [job for job in jobs if not self.record.is_done(job.name)]
        planned = []
        for job in missing if self.settings.batch_invariant or not missing else jobs:
            try:
                planned.append(self.plan(job, arguments_of(self.readers, job.given)))
            except InputError as error:
                yield self.fail(job, str(error))
        for same in alike(planned):
            yield from self.paint(same)

    def __call__(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Do pieces of work that come as rows of JSON, as Ray Data hands them over, and return what came of them."""
        results = []
        for row in rows["piece"]:
            outcomes = self.work([Job(*job) for job in json.loads(row)])
            results.append(json.dumps([(outcome.job.name, outcome.error) for outcome in outcomes]))
        return {"outcomes": results}

    def close(self) -> None:
        self.record.close()

    def fail(self, job: Job, error: str) -> Outcome:
        self.record.fail(job.name, error)
        return Outcome(job, error)

    def plan(self, job: Job, a: argparse.Namespace) -> Planned:
        """InputError for what cannot be run."""
        of = COMMANDS[a.command]
        of.check(a)
        common.check_writable(a.save_latents, read=of.sources(a))
        checkpoints = self.keep("files", values(a, MODELS), lambda: of.opened(a))
        with readable(a) as with_picture:
            run = of.planned(a, of.inputs_of(with_picture, checkpoints), self.device)
        is_apart = self.settings.batch_invariant
        apart = {name: replace(request, batch_invariant=is_apart) for name, request in requests_of(run).items()}
        return Planned(job, a, run._replace(**apart))

    def paint(self, planned: Sequence[Planned]) -> Iterator[Outcome]:
        """Paint jobs in one run; where that cannot be, each by itself."""
        try:
            painted = self.painted(planned)
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError | MemoryError) and not SIGNS.search(str(error)):
                raise
            if len(planned) > 1:
                for one in planned:  # planned anew: its generator has drawn
                    yield from self.paint([self.plan(one.job, one.arguments)])
                return
            yield self.fail(planned[0].job, str(error) if isinstance(error, InputError) else NO_MEMORY)
            return
        for one, results in zip(planned, painted, strict=True):
            self.save(one, *results)
            yield Outcome(one.job)

    def painted(self, planned: Sequence[Planned]) -> list[common.Painted]:
        """The pictures of jobs that have all but what is each picture's own in common, with all their settings."""
        a = planned[0].arguments
        of = COMMANDS[a.command]
        opened: Opened = self.keep("weights", values(a, WEIGHTS), lambda: self.load(planned[0]))
        adapters = self.keep(ADAPTERS, (id(opened.pipe), *a.lora), lambda: self.put_on(opened.pipe, a.lora))
        latents = of.denoised(a, together([one.run for one in planned]), opened.pipe)  # (n*b,4,h,w)
        results = []
        for one, own in zip(planned, latents.chunk(len(planned)), strict=True):
            made = of.finished(one.arguments, one.run, opened.pipe, opened.identities, own)
            results.append((made[0], made[1], made[2] | adapters | opened.settings))
        return results

    def load(self, planned: Planned) -> Opened:
        """Read the weights of a job. InputError as of `Record.check_weights`."""
        a = planned.arguments
        make_faster = common.faster(a, self.device)
        pipe, identities = COMMANDS[a.command].load(a, planned.run, self.device)
        pipe.set_progress_bar_config(disable=True)
        embeddings = common.load_embeddings(pipe, a.embedding)
        names = [name for name in (getattr(a, "checkpoint", None), a.base, a.refiner) if name is not None]
        kinds = [model.config.kind for model in pipe.models()]  # "pocket" is two files
        roles = [f"{kind} {name}" for kind, name in zip(kinds, names, strict=True)]
        digests = {role: one["checkpoint"]["sha256"] for role, one in zip(roles, identities, strict=True)}
        if a.vae is not None:
            digests[f"VAE {a.vae}"] = identities[0]["checkpoint"]["vae"]
        digests |= dict(zip(a.embedding, embeddings.get("embeddings_sha256", []), strict=True))
        self.record.check_weights(digests)
        return Opened(pipe, identities, embeddings | make_faster(pipe))

    def put_on(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        """Put adapters on in place of those of the job before."""
        pipe.unload_lora_weights()
        settings = common.put_on(pipe, texts)
        if texts:
            files = [str(common.adapter_options().path_and_scale(text)[0]) for text in texts]
            self.record.check_weights(dict(zip(files, settings["lora_sha256"], strict=True)))
        return settings

    def save(self, planned: Planned, pictures: Sequence[Any], latents: Tensor, settings: Mapping[str, Any]) -> None:
        """Write a job's pictures, and then note that they are there."""
        a = planned.arguments
        paths = common.names_of_several(self.record.folder / f"{planned.job.name}.png", len(pictures))
        for i, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
            common.save_picture(picture, path, {**settings, "seed": (a.seed + i) % 2**64})
        last = settings["sigmas"][-1]
        common.save_latents(a.save_latents, latents, last[-1] if isinstance(last, list) else last)
        self.record.finish(planned.job.name, [path.name for path in paths], planned.job.options)

    def keep(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """What was made last of this kind where the key is the same; else it is forgotten, and made anew."""
        if kind not in self.kept or self.kept[kind][0] != key:
            self.kept.pop(kind, None)
            if kind == "weights":
                self.kept.pop(ADAPTERS, None)
                gc.collect()  # hooks and networks point at each other
            self.kept[kind] = key, make()
        return self.kept[kind][1]


@contextmanager
def readable(a: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments of a job for as long as its picture is read: one in a tar is taken out."""
    if ".tar/" not in str(getattr(a, "image", "")).lower():
        yield a
        return
    from sdxl_ref.running.tar_shards import taken_out

    with taken_out(a.image) as image:
        yield argparse.Namespace(**vars(a) | {"image": image})


def values(a: argparse.Namespace, names: Sequence[str]) -> tuple[Any, ...]:
    """Of arguments, to be compared; None for those that their command does not have."""
    found = (getattr(a, name, None) for name in names)
    return tuple(tuple(value) if isinstance(value, list) else value for value in found)


def alike(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Those together that can be one run: of one command, model, size and way of denoising."""
    groups: dict[Any, list[Planned]] = {}
    for one in planned:
        size = getattr(one.run, "picture", one.run).size
        groups.setdefault((kind_of(one.arguments), size), []).append(one)
    return list(groups.values())


def kind_of(a: argparse.Namespace) -> Any:
    """What jobs that can be one run agree in, but for the size of a picture."""
    shared = values(a, [name for name in vars(a) if name not in (*OWN, "save_latents")])
    return shared, tuple(getattr(a, name, None) is None for name in (*PROMPTS, "mask"))


def together(runs: Sequence[Any]) -> Any:
    """Of several jobs of a command one: with the requests of all in one."""
    return runs[0]._replace(**{name: joined([getattr(run, name) for run in runs]) for name in requests_of(runs[0])})


def requests_of(run: Any) -> dict[str, Request]:
    """Those of a command's job, by the names of its fields: one, or one for each stage."""
    return {name: value for name, value in zip(run._fields, run, strict=True) if isinstance(value, Request)}


def joined(requests: Sequence[Request]) -> Request:
    """One request for the pictures of all, which agree in everything else."""
    if len(requests) == 1:
        return requests[0]
    own: dict[str, Any] = {}
    for field in fields(requests[0]):
        given = [getattr(request, field.name) for request in requests]
        if field.name in ("image", "mask_image", "generator", *PROMPTS) and given[0] is not None:
            counts = [request.prompts for request in requests]
            lists = [one if isinstance(one, list) else [one] * n for one, n in zip(given, counts, strict=True)]
            own[field.name] = [value for values in lists for value in values]
    return replace(requests[0], **own)
