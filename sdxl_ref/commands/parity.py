"""`sdxl-ref parity`: where another implementation starts to differ, and what explains it.

Exit status 0 where it agrees, 1 where it differs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sdxl_ref.commands import common, generate, refine
from sdxl_ref.config import InputError
from sdxl_ref.parity import live_runs, report_page, tables
from sdxl_ref.parity.kit import FILE, Kit, make_kit
from sdxl_ref.parity.pipelines import compare_with_kit
from sdxl_ref.parity.recorded_command import recorded
from sdxl_ref.parity.report import Report
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.two_traces import compare_traces
from sdxl_ref.pipelines import DiffusionPipeline
from sdxl_ref.weights.file_saving import write_text
from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import open_checkpoint

COMPONENTS = ("unet", "vae", "text", "sampler", "pipeline")
LARGE = 2e9  # bytes of files
MODEL = "file, folder, repository of the hub, or pocket"
EXAMPLES = """examples:
  a kit:              sdxl-ref parity kit --checkpoint pocket-refiner --out kit
  a trace of theirs:  sdxl-ref parity compare theirs.safetensors --kit kit --html report.html
  two traces:         sdxl-ref parity compare a.safetensors b.safetensors
  a live peer:        sdxl-ref parity run --checkpoint pocket-refiner --against diffusers
  a run, recorded:    sdxl-ref parity record --trace trace.safetensors refine photo.jpg --prompt "a cup" …

columns: `relative` is the distance from the reference's run and `allowed` what rounding adds up to along it; `own` is
the module's error on its own input and `budget` what rounding explains of that; `inherited` is what our module makes of
their input. Verdicts: `fault` is beyond its budget, `inherits` beyond what is allowed though not by itself, else `ok`.
"""


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EXAMPLES
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    kit = actions.add_parser("kit", help="a realistic run with budgets, for any implementation to check itself")
    kit.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL)
    kit.add_argument("--out", type=Path, required=True, metavar="DIR")
    kit.add_argument("--sketch", action="store_true", help="count sketches instead of tensors: for full size")
    record = actions.add_parser("record", help="record a run of refine or generate")
    record.add_argument("--trace", type=Path, required=True, metavar="FILE", help="where the trace is written")
    record.add_argument("--points", action="append", metavar="GLOB", help='such as "unet/**"; repeatable; else all')
    record.add_argument("--sketch", action="store_true", help="count sketches instead of tensors")
    record.add_argument("run", nargs=argparse.REMAINDER, metavar="refine|generate …", help="a command as it stands")
    compare = actions.add_parser("compare", help="a trace with a kit, or with another trace")
    compare.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="a file, or a folder of .npy files")
    compare.add_argument(
        "--kit", type=Path, metavar="DIR", help="as `parity kit` wrote it; else two traces are compared"
    )
    compare.add_argument("--checkpoint", metavar="MODEL", help="the kit's own; else it is looked for by its name")
    compare.add_argument(
        "--map",
        type=Path,
        metavar="FILE.json",
        help='their names of points -> official ones: {"mid_norm": "unet/middle_block.1.norm"}',
    )
    compare.add_argument(
        "--dtype", choices=common.DTYPES, help="in which theirs computed; else what their numbers need"
    )
    compare.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw", help="of their maps")
    live = actions.add_parser("run", help="a live peer beside ours")
    live.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL)
    live.add_argument("--against", required=True, metavar="diffusers|FILE.py:function")
    live.add_argument("--part", choices=COMPONENTS, help="one component; else all of them")
    live.add_argument("--dtype", default="float32", choices=common.DTYPES)
    for action in (kit, live):
        action.add_argument("--side", type=int, metavar="PIXELS", help="of the run's picture; else at most 256")
    for action in (compare, live):
        action.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
        action.add_argument("--html", type=Path, metavar="FILE", help="write the report there, as a page")
        action.add_argument("--all", action="store_true", help="print every point, not only those that are off")


def run(a: argparse.Namespace) -> int:
    return {"kit": run_kit, "record": run_record, "compare": run_compare, "run": run_live}[a.action](a)


def run_kit(a: argparse.Namespace) -> int:
    if (a.out / FILE).exists():
        raise InputError(f"{a.out} holds a kit: name another folder")
    kit = make_kit(open_pipeline(a.checkpoint), a.out, sketch=a.sketch, side=a.side)
    size = (a.out / FILE).stat().st_size
    print(f"wrote {a.out}: {len(kit.trace.points())} points, {size / 1e6:.1f} MB")
    return 0


def open_pipeline(name: str) -> Any:
    """The pipeline of a checkpoint, in float32; of a large one, one network at a time is in memory."""
    checkpoint = open_checkpoint(name)
    is_large = sum(file.stat().st_size for file in checkpoint.files()) > LARGE
    return DiffusionPipeline.from_pretrained(checkpoint, offload=Offload("cpu") if is_large else None)


def run_record(a: argparse.Namespace) -> int:
    if a.run[:1] not in (["refine"], ["generate"]):
        raise InputError("expected `refine …` or `generate …` behind the options of `parity record`")
    common.check_writable(a.trace)
    command = {"refine": refine, "generate": generate}[a.run[0]]
    parser = type(a.parser)(prog=f"sdxl-ref {a.run[0]}")
    command.arguments(parser)
    arguments = parser.parse_args(a.run[1:], argparse.Namespace(command=a.run[0]))
    trace = recorded(command, arguments, a.trace, a.points or ["**"], a.sketch)
    print(f"wrote {a.trace}: {len(trace.points())} points")
    return 0


def run_compare(a: argparse.Namespace) -> int:
    if (a.kit is None) != (len(a.traces) == 2) or len(a.traces) > 2:
        raise InputError("expected one trace with --kit DIR, or two traces")
    common.check_writable(a.json, a.html)
    first, *others = [read_trace(path, a) for path in a.traces]
    if others:
        return finish(compare_traces(first, others[0]), a, f"{a.traces[0].name} and {a.traces[1].name}")
    kit = Kit.open(a.kit)
    pipe, note = checkpoint_of(kit, a.checkpoint)
    report = compare_with_kit(first, kit, pipe, dtype=getattr(torch, a.dtype) if a.dtype else None)
    report.notes += [note] * bool(note)
    return finish(report, a, a.traces[0].name, kit.settings)


def read_trace(path: Path, a: argparse.Namespace) -> Trace:
    trace = Trace.load(path)
    if a.map is not None:
        trace = trace.renamed(names_of(a.map, trace))
    return trace.channels_first() if a.layout == "nhwc" else trace


def names_of(path: Path, trace: Trace) -> dict[str, str]:
    """Of `--map`. InputError unless it says what points of the trace are called."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON file of names: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise InputError(f'{path}: expected {{"their name": "official name", …}}, found {names!r:.60}')
    for name in names.values():
        if Key.parse(name) != Key(name):
            raise InputError(f"{path}: expected names of points, without #2 or :in.0, found {name}")
    strange = sorted(names.keys() - set(trace.points()))
    if strange:
        raise InputError(f"{path}: the trace has no points {', '.join(strange[:3])}, only such as {trace.points()[0]}")
    return names


def checkpoint_of(kit: Kit, name: str | None) -> tuple[Any, str]:
    """The pipeline that a kit is of, or None and why its modules cannot be run."""
    wanted = name or kit.settings.get("model")
    if wanted is None or (name is None and not Path(wanted).exists()):
        where = "the kit names no checkpoint" if wanted is None else f"{wanted} is not here"
        return None, f"own and inherited errors are not told apart: {where} (give --checkpoint MODEL)"
    pipe = open_pipeline(wanted)
    if pipe.checkpoint.sha256() != kit.settings.get("sha256"):
        raise InputError(
            f"{wanted} is not the file that the kit was made of: give --checkpoint MODEL, or make a kit of it"
        )
    return pipe, ""


def run_live(a: argparse.Namespace) -> int:
    common.check_writable(a.json, a.html)
    report = live_runs.run_live(a.checkpoint, a.against, a.part, getattr(torch, a.dtype), a.side)
    return finish(report, a, f"{a.checkpoint} against {a.against}")


def finish(report: Report, a: argparse.Namespace, title: str, settings: dict[str, Any] | None = None) -> int:
    for line in tables.lines(report, a.all):
        print(line)
    if a.json is not None:
        write_text(a.json, json.dumps(report.as_json(), indent=1))
    if a.html is not None:
        write_text(a.html, report_page.page(report, title, settings))
    return 0 if report.agrees else 1
