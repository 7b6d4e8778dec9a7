"""`sdxl-ref parity run`: each component of a checkpoint against a live peer, on the numbers of a real run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.freed_memory import give_freed_memory_back
from sdxl_ref.parity import live
from sdxl_ref.parity.compare import compare
from sdxl_ref.parity.kit import Kit, copy_in, make_kit, request_for, run, side_for
from sdxl_ref.parity.network_runs import inputs_from
from sdxl_ref.parity.pipelines import compare_with_kit
from sdxl_ref.parity.recording import Recorder
from sdxl_ref.parity.report import Report
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.pipelines import DiffusionPipeline
from sdxl_ref.weights.checkpoint import PARTS
from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import open_checkpoint

NETWORKS = {"unet": ("unet",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}


def run_live(name: str, against: str, component: str | None, dtype: torch.dtype, side: int | None = None) -> Report:
    """One report of a component, or of all networks and, against diffusers, of a whole run. InputError as `live`'s.

    One network is in memory at a time, until the whole run, which wants them all.
    """
    function = None if against == "diffusers" else live.function_of(against)
    if function is not None and component in ("sampler", "pipeline"):
        raise InputError(f"--part {component} is compared with diffusers alone: a function is handed networks")
    report = Report()
    parts = (
        [part for parts in NETWORKS.values() for part in parts] if component is None else NETWORKS.get(component, ())
    )
    if parts:
        checkpoint = open_checkpoint(name)
        inputs = inputs_of(DiffusionPipeline.from_pretrained(checkpoint, offload=Offload("cpu")), side)
        give_freed_memory_back()
        for part in parts:
            if part in inputs:
                add(report, one_network(checkpoint.load(part), part, inputs[part], function, dtype))
    if function is None and component not in NETWORKS:
        add(report, whole_run(DiffusionPipeline.from_pretrained(name), dtype, component, side))
    return report


def one_network(
    network: nn.Module, part: str, inputs: Sequence[Tensor], function: Callable[..., Any] | None, dtype: torch.dtype
) -> Report:
    """Of one of ours and its peer. A peer that stops in the middle is told, and the others are still compared."""
    try:
        if function is not None:
            return compare(network, given_to(function, part, network), inputs, dtype)
        return compare(network, live.peer_of(network, part, dtype), inputs)
    except Exception as error:  # of anybody's code
        why = next(iter(str(error).splitlines()), "")
        return Report(culprits=[part], notes=[f"{part}: the peer stopped: {type(error).__name__}: {why}"])


def given_to(function: Callable[..., Any], part: str, network: nn.Module) -> Any:
    """What a function returns for a part. It is handed a network of its own, whose weights are ours.

    InputError where it writes into these.
    """
    handed = copy_in(network, next(network.parameters()).dtype)
    before = [parameter._version for parameter in network.parameters()]
    candidate = function(part, handed)
    if before != [parameter._version for parameter in network.parameters()]:
        raise InputError("the function wrote into our weights: let it write into copies (copy.deepcopy)")
    return candidate


def add(report: Report, other: Report) -> None:
    report.points += other.points
    report.culprits += other.culprits
    report.causes |= other.causes
    report.pictures = other.pictures or report.pictures
    # A network of another kind has no like of some modules: that is no news.
    report.notes += [note for note in other.notes if "are not in the trace" not in note]


def inputs_of(pipe: Any, side: int | None) -> dict[str, Sequence[Tensor]]:
    """What each network is handed first in a kit's run."""
    recorder = Recorder([*PARTS, "vae/encoder", "vae/post_quant_conv"])
    with TemporaryDirectory() as folder:
        settings = {"request": request_for(pipe, side_for(pipe, side), Path(folder))}
        run(pipe, Kit(Trace(settings=settings), Path(folder)), recorder)
    trace = recorder.trace

    parts = [part for part in PARTS if getattr(pipe, part) is not None]
    return {part: inputs_from(part, trace.tensor) for part in parts}


def whole_run(pipe: Any, dtype: torch.dtype, component: str | None, side: int | None) -> Report:
    """diffusers' pipeline on a kit's request; of the sampler alone, what is between the networks."""
    with TemporaryDirectory() as folder:
        kit = make_kit(
            pipe, Path(folder), (dtype,), side=side, whole_sizes=dtype == torch.bfloat16, say=lambda text: None
        )
        theirs = live.recorded(live.diffusers_pipeline(pipe, dtype), pipe, kit)
        if component != "pipeline":
            theirs.values = {key: value for key, value in theirs.values.items() if not is_inside(key)}
            theirs.same = {}
        return compare_with_kit(theirs, kit, pipe)


def is_inside(key: Key) -> bool:
    """Whether a key is of a module inside a network, which was compared by itself."""
    return "/" in key.point and key.point.split("/")[0] in PARTS
