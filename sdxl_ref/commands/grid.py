"""`sdxl-ref grid`: a contact sheet over any options of refine (with a picture) or generate (without one)."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdxl_ref.adapters import lora
from sdxl_ref.commands import common, generate, refine
from sdxl_ref.commands.axes import NO_USE, Axis, Cell, axes_of, cells_of, named, rows_of
from sdxl_ref.config import InputError
from sdxl_ref.pictures.settings import texts
from sdxl_ref.pictures.sheets import LabelledSheet
from sdxl_ref.weights.checkpoint import Checkpoint

READ = ("mask", "max_pixels", "checkpoint", "base", "refiner", "variant", "vae")  # what decides which files are opened
WEIGHTS = (*READ[2:], "dtype", "vae_dtype", "prediction", "plain", "embedding")  # and which weights are in memory
SIDES = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # the most pixels that a side has in these formats
EXAMPLES = """examples:
  sdxl-ref grid photo.jpg --over strength=0.1,0.3 sampler=euler,dpmpp_2m --checkpoint REFINER --prompt "a red barn"
  sdxl-ref grid --over seed=1,2,3 karras=true,false --base BASE --refiner REFINER --prompt "a red barn"
  sdxl-ref grid photo.jpg --over "prompt=a red barn, at night|a barn" lora=none,a.safetensors:0.8 --checkpoint REFINER

With a picture as the first word the options are those of refine, without one those of generate. Each cell is the
picture that they make. The first axis runs across, the others down, the last one fastest. Values are separated by
commas, or by | where there is one: "prompt=one, two|three"; lists only by |: "sigmas=14,2,0|14,1,0". Those of a switch
(karras, watermark) are true and false. none adds nothing: what else the line says counts. An adapter of an axis is put
on in addition to those of --lora. The PNG has the settings of every cell.
"""


Place = tuple[int, int]  # row, column


class Planned(NamedTuple):
    """A cell that only weights are missing of."""

    cell: Cell
    job: Any


def arguments(p: argparse.ArgumentParser) -> None:
    """The options of refine where a picture is the first word, else those of generate."""
    words = p.get_default("words")
    command: Any = refine if words and not words[0].startswith("-") else generate
    command.arguments(p)
    p.epilog = EXAMPLES
    p.add_argument("--over", nargs="+", required=True, metavar="NAME=V1,V2", help="an option and its values")
    for action in p._actions:
        action.required = action.required and action.dest not in named(words)
    p.set_defaults(of=command)


def run(a: argparse.Namespace) -> int:
    of = a.of
    a.command = of.__name__.rpartition(".")[2]  # of each picture
    for name in NO_USE:
        if getattr(a, name, None) != a.parser.get_default(name):
            raise InputError(
                f"--{name.replace('_', '-')} is of no use to a grid: each cell has one picture, on the sheet"
            )
    out = a.out or common.free_name(Path(f"{Path(a.image).stem}-grid.png" if of is refine else "grid.png"))
    axes = axes_of(a.parser, a, a.over)
    cells = list(cells_of(axes, a))
    check(cells, of, out)
    device = common.pick_device(a.device)
    planned = plan_all(cells, of, device)
    sheet = sheet_of(axes, planned, out)
    across = len(axes[0].values)
    size = "{}x{}".format(*sheet.size)
    print(f"grid: {across} across, {len(cells) // across} down, on a sheet of {size} pixels", flush=True)
    grid = Grid(axes, cells, sheet)
    try:
        for group in groups_of(planned, lambda plan: attributes(plan.cell, WEIGHTS)):
            grid.paint(group, of, device)
    finally:  # what is finished is kept, whatever stopped the rest
        if grid.settings:
            grid.save(out)
    if not grid.settings:
        print("nothing was written: no cell could be painted", file=sys.stderr)
    return 1 if grid.failures else 0


def check(cells: Sequence[Cell], of: Any, out: Path) -> None:
    """InputError for options that do not go together in a cell, and where the sheet cannot be written."""
    sources: dict[object, None] = {}
    for cell in cells:
        with naming(cell):
            of.check(cell.arguments)
            sources |= dict.fromkeys(of.sources(cell.arguments))
    common.check_writable(out, read=list(sources))
    common.check_format(out)


def plan_all(cells: Sequence[Cell], of: Any, device: torch.device) -> list[Planned]:
    """Plan every cell; pictures and models are opened once for all that share them, adapters are tried on."""
    inputs: dict[Any, Any] = {}
    fitting: set[Any] = set()
    planned = []
    for cell in cells:
        a = cell.arguments
        with naming(cell):
            key = attributes(cell, READ)
            if key not in inputs:
                inputs[key] = of.inputs_of(a, of.opened(a))
            job = of.planned(a, inputs[key], device)
            planned.append(Planned(cell, job))
            for path in common.adapter_files(a.lora):
                if (path, key) not in fitting:
                    try_on(path, job.checkpoints)
                fitting.add((path, key))
    return planned


def try_on(path: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """InputError, the first model's, where an adapter fits none of them: their weights are not needed for that."""
    errors = []
    for checkpoint in checkpoints:
        try:
            lora.load(path, checkpoint.config)
        except InputError as error:
            errors.append(error)
    if len(errors) == len(checkpoints):
        raise errors[0]


def sheet_of(axes: Sequence[Axis], planned: Sequence[Planned], out: Path) -> LabelledSheet:
    """The sheet, not yet drawn. InputError where its format, or Pillow, has no room for it."""
    sizes = [getattr(plan.job, "picture", plan.job).size for plan in planned]  # of the picture that it starts from
    largest = (max(width for width, _ in sizes), max(height for _, height in sizes))
    names = [axis.name for axis in axes]
    across = [[(names[0], value.label)] for value in axes[0].values]
    down = [[(name, value.label) for name, value in zip(names[1:], row, strict=True)] for row in rows_of(axes)]
    sheet = LabelledSheet(largest, across, down)
    width, height = sheet.size
    most = 2 * (Image.MAX_IMAGE_PIXELS or width * height)  # beyond this Pillow opens no picture
    side = SIDES.get(out.suffix.lower(), max(sheet.size))
    if width * height > most or max(sheet.size) > side:
        limit = f"{most:,} pixels" if width * height > most else f"{side:,} pixels a side in a {out.suffix}"
        raise InputError(f"the sheet would have {width}x{height} pixels, expected at most {limit}: give fewer values")
    return sheet


class Grid:
    """A sheet that fills, with the settings of what is on it, or why there is nothing."""

    def __init__(self, axes: Sequence[Axis], cells: Sequence[Cell], sheet: LabelledSheet) -> None:
        self.axes = axes
        self.cells = cells
        self.sheet = sheet
        self.settings: dict[Place, dict[str, Any]] = {}
        self.failures: dict[Place, str] = {}

    def paint(self, group: Sequence[Planned], of: Any, device: torch.device) -> None:
        """Paint cells of the same weights: these are read once, and adapters put on and off in between."""
        a = group[0].cell.arguments
        make_faster = common.faster(a, device)
        pipe, identities = of.load(a, group[0].job, device)
        faster = common.load_embeddings(pipe, a.embedding) | make_faster(pipe)
        for same in groups_of(group, lambda plan: tuple(plan.cell.arguments.lora)):
            pipe.unload_lora_weights()
            try:
                adapters = common.put_on(pipe, same[0].cell.arguments.lora)
            except InputError as error:
                for plan in same:
                    self.fail(plan.cell, str(error))
                continue
            for plan in same:
                self.paint_cell(plan, partial(of.paint, pipe=pipe, identities=identities), adapters | faster)
        for checkpoint in group[0].job.checkpoints:
            common.say_changes(checkpoint)

    def paint_cell(self, plan: Planned, paint: Callable[..., Any], made: dict[str, Any]) -> None:
        """Paint one, or say why that is not possible."""
        cell = plan.cell
        number = len(self.settings) + len(self.failures) + 1
        steps = str(plan.job.plan).replace("\n", "; ")
        print(f"{number} of {len(self.cells)}: {cell}: {steps}", flush=True)
        try:
            [picture], _, settings = paint(cell.arguments, plan.job)
        except InputError as error:
            self.fail(cell, str(error))
            return
        self.sheet.put(cell.row, cell.column, picture)
        self.settings[cell.place] = json.loads(texts(settings | made)["sdxl_ref"])

    def fail(self, cell: Cell, reason: str) -> None:
        print(f"failed: {cell}: {reason}", file=sys.stderr, flush=True)
        self.failures[cell.place] = reason

    def save(self, out: Path) -> None:
        """Write the sheet; places without a picture say why."""
        for cell in self.cells:
            if cell.place not in self.settings:
                self.sheet.mark(*cell.place, self.failures.setdefault(cell.place, "not painted: stopped before"))
        common.save_picture(self.sheet.image, out, self.record())
        print(f"wrote {out}")

    def record(self) -> dict[str, Any]:
        """What all pictures have in common, the axes, and of every cell what it has besides or in its own way."""
        first, *others = self.settings.values()
        shared = {name: first[name] for name in first if all(first[name] == other.get(name, ...) for other in others)}
        prompts = dict.fromkeys(settings["prompt"] for settings in self.settings.values())
        over = {axis.name: [value.label for value in axis.values] for axis in self.axes}
        top = shared | {"command": "grid", "prompt": "; ".join(prompts), "over": over}
        cells = []
        for cell in self.cells:
            made: dict[str, Any] = {"row": cell.row, "column": cell.column, "over": cell.values}
            if cell.place in self.settings:
                settings = self.settings[cell.place]
                made["settings"] = {name: settings[name] for name in settings if settings[name] != top.get(name, ...)}
            else:
                made["error"] = self.failures[cell.place]
            cells.append(made)
        return top | {"cells": cells}


@contextmanager
def naming(cell: Cell) -> Iterator[None]:
    """Have an InputError say which cell it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{cell}: {error}") from error


def attributes(cell: Cell, names: Sequence[str]) -> tuple[Any, ...]:
    """Arguments of a cell; None for those that its command does not have."""
    values = (getattr(cell.arguments, name, None) for name in names)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def groups_of(planned: Sequence[Planned], key: Callable[[Planned], Any]) -> list[list[Planned]]:
    """Those of one key together, in the order in which the keys come first."""
    groups: dict[Any, list[Planned]] = {}
    for plan in planned:
        groups.setdefault(key(plan), []).append(plan)
    return list(groups.values())
