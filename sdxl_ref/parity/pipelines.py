"""A trace of a whole run against a kit, and a kit's run by any pipeline of ours."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.parity import peers
from sdxl_ref.parity.diagnosis import explained
from sdxl_ref.parity.exact import exact_pipeline
from sdxl_ref.parity.kit import Kit, run
from sdxl_ref.parity.network_runs import inputs_from, replayed
from sdxl_ref.parity.recording import Recorder, machine, models_of, written
from sdxl_ref.parity.replay import SOURCES, Replay
from sdxl_ref.parity.report import Report, judge, missing_points
from sdxl_ref.parity.steps_between import explain
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.weights.checkpoint import PARTS


def replay(pipe: Any, kit: Kit | Path | str, path: Path | str | None = None) -> Trace:
    """Run a pipeline, perhaps with networks that were changed, on a kit's own request; its trace, written to `path`."""
    kit = kit if isinstance(kit, Kit) else Kit.open(kit)
    recorder = Recorder()
    recorder.trace.settings |= machine() | models_of(pipe)
    with written(recorder.trace, path):
        run(pipe, kit, recorder)
    return recorder.trace


def compare_with_kit(
    theirs: Trace, kit: Kit, pipe: Any = None, causes: bool = True, dtype: torch.dtype | None = None
) -> Report:
    """The report of a trace against a kit. With a pipeline of the kit's checkpoint each module's own error is known.

    `dtype` is that in which theirs computed; None: that of most of their networks' numbers, also where these are kept
    in more bits.
    InputError where nothing in the trace has a name that the kit knows.
    """
    theirs = with_inputs(theirs if pipe is None else with_our_names(theirs, pipe)).in_batches_of(kit.trace)
    known = set(kit.trace.points())
    if not known & set(theirs.points()):
        ours, other = ", ".join(kit.trace.points()[:3]), ", ".join(theirs.points()[:3])
        raise InputError(f"no point of the kit ({ours}, …) is in the trace ({other}, …): rename them, or use --map")
    dtype = dtype or dtype_of(theirs)
    theirs = narrowed(theirs, dtype)
    budget = kit.budget(dtype)
    if pipe is None:
        report = judge([], {}, theirs, kit.trace, budget)
    else:
        with exact_pipeline(pipe):
            found = Replay(theirs, kit.trace)
            run(pipe, kit, found)
            report = judge(found.checks, found.inherited, theirs, kit.trace, budget)
            if causes and report.culprits:
                report.causes = causes_of(report, found, theirs, kit, pipe)
    report.notes.append(f"the budget is that of {str(dtype).removeprefix('torch.')}")
    strange = [point for point in theirs.points() if point not in known]
    if strange:
        report.notes.append(missing_points(strange, "the kit"))
    return report


def causes_of(report: Report, found: Replay, theirs: Trace, kit: Kit, pipe: Any) -> dict[str, str]:
    """What explains the culprits: of each network by its modules, and between them."""
    causes = explain(found, pipe, kit.request(pipe).completed(pipe.defaults), report.culprits)
    for part in PARTS:
        network = getattr(pipe, part)
        inputs = inputs_from(part, found.roots.get)
        if network is None or not any(value is not None for value in inputs):
            continue
        again = partial(replayed, network, part, inputs, theirs, None)
        causes |= explained(part, network, again, report, found.checks)
    return causes


def dtype_of(trace: Trace) -> torch.dtype:
    """That of most of a trace's numbers inside networks; of float32 and float64 as of float32."""
    inside = (value for key, value in trace.values.items() if key.point.removeprefix("refiner/").split("/")[0] in PARTS)
    counts = Counter(needed(value) for value in inside if isinstance(value, Tensor) and value.is_floating_point())
    return counts.most_common(1)[0][0] if counts else torch.float32


def needed(value: Tensor) -> torch.dtype:
    """The narrowest dtype that holds a tensor's numbers: where one was computed in, whatever they are kept in."""
    some = value.detach().flatten()[:4096]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(some.to(dtype).to(some.dtype), some):
            return dtype
    return torch.float32


def narrowed(trace: Trace, dtype: torch.dtype) -> Trace:
    """With those tensors in a dtype that it holds without loss."""

    def narrow(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        other = value.to(dtype)
        return other if torch.equal(other.to(value.dtype), value) else value

    return Trace({key: narrow(value) for key, value in trace.values.items()}, trace.same, trace.settings)


def with_inputs(theirs: Trace) -> Trace:
    """With what a network is handed under the network's name, where it stands under that of the step that makes it."""
    handed = {source: Key.parse(name) for name, source in SOURCES.items() if not source.startswith(tuple(PARTS))}
    values = dict(theirs.values)
    for key, value in theirs.values.items():
        other = handed.get(key.point)
        if other is not None and not key.point.startswith("conditioning/"):  # these are points besides
            del values[key]
            values.setdefault(other._replace(call=key.call), value)
    return Trace(values, theirs.same, theirs.settings)


def with_our_names(theirs: Trace, pipe: Any) -> Trace:
    """With official names, where a part has those of diffusers or transformers."""
    names: dict[str, str] = {}
    points = set(theirs.points())
    for part in PARTS:
        network = getattr(pipe, part)
        if network is None:
            continue
        ours = {f"{part}/{name}" for name, _ in network.named_modules() if name}
        others = {
            f"{part}/{other}": f"{part}/{name}"
            for other, name in peers.names_of(part, network).items()
            if other and name[:1] != ":"
        }
        if len(points & set(others)) > len(points & ours):
            names |= others
    return theirs.renamed(names) if names else theirs
