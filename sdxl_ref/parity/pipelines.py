"""A trace of a whole run against a kit, and a kit's run by any pipeline of ours."""

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
from sdxl_ref.parity.recording import Recorder, machine, models_of
from sdxl_ref.parity.replay import Replay
from sdxl_ref.parity.report import Report, judge
from sdxl_ref.parity.steps_between import explain
from sdxl_ref.parity.trace import Trace
from sdxl_ref.weights.checkpoint import PARTS


def replay(pipe: Any, kit: Kit | Path | str, path: Path | str | None = None) -> Trace:
    """Run a pipeline, perhaps with networks that were changed, on a kit's own request; its trace, written to `path`."""
    kit = kit if isinstance(kit, Kit) else Kit.open(kit)
    recorder = Recorder()
    recorder.trace.settings |= machine() | models_of(pipe)
    run(pipe, kit, recorder)
    if path is not None:
        recorder.trace.save(path)
    return recorder.trace


def compare_with_kit(theirs: Trace, kit: Kit, pipe: Any = None, causes: bool = True) -> Report:
    """The report of a trace against a kit. With a pipeline of the kit's checkpoint each module's own error is known.

    InputError where nothing in the trace has a name that the kit knows.
    """
    theirs = (theirs if pipe is None else with_our_names(theirs, pipe)).in_batches_of(kit.trace)
    common = [key for key in kit.trace.outputs() if key in theirs]
    if not common:
        ours, other = ", ".join(kit.trace.points()[:3]), ", ".join(theirs.points()[:3])
        raise InputError(f"no point of the kit ({ours}, …) is in the trace ({other}, …): rename them, or use --map")
    budget = kit.budget(dtype_of(theirs))
    if pipe is None:
        return judge([], {}, theirs, kit.trace, budget)
    with exact_pipeline(pipe):
        found = Replay(theirs, kit.trace)
        run(pipe, kit, found)
        report = judge(found.checks, found.inherited, theirs, kit.trace, budget)
        if causes and report.culprits:
            report.causes = causes_of(report, found, theirs, kit, pipe)
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
    """Of most of a trace's networks: the narrowest one that is not a whole number's."""
    found = {value.dtype for key, value in trace.values.items() if isinstance(value, Tensor) and "/" in key.point}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in found:
            return dtype
    return torch.float32


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
