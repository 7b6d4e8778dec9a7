"""What explains a difference: each known mistake is made in ours, on their input, and some reproduce their output."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.parity.exact import exact
from sdxl_ref.parity.mistakes import MISTAKES, Mistake
from sdxl_ref.parity.network_runs import replayed
from sdxl_ref.parity.replay import Check, Replay
from sdxl_ref.parity.report import Report
from sdxl_ref.parity.trace import Trace

MOST_SEARCHED = 8  # culprits for which every mistake is tried
MOST_TRIED = 64  # and for which those are that explained the others
CLEARLY = 8.0  # times nearer their output, at least: then it is an explanation


def diagnose(
    network: nn.Module, part: str, inputs: Sequence[Tensor], theirs: Trace, report: Report, checks: Sequence[Check]
) -> dict[str, str]:
    """For each culprit of a network the mistake that explains it best, in words; culprits without one are left out."""

    def run() -> Replay:
        with exact(network):
            return replayed(network, part, inputs, theirs, None)

    return explained(part, network, run, report, checks)


def explained(
    part: str, network: nn.Module, run: Callable[[], Replay], report: Report, checks: Sequence[Check]
) -> dict[str, str]:
    causes: dict[str, str] = {}
    usual: dict[str, Mistake] = {}  # what explained a culprit is tried first with the next, and is enough if it does
    searched = 0
    for culprit in [c for c in report.culprits if c == part or c.startswith(f"{part}/")][:MOST_TRIED]:
        name = culprit.removeprefix(part).removeprefix("/")
        module = network.get_submodule(name)
        before = worst(checks, culprit)
        best = nearest(usual.values(), module, run, culprit, before)
        if best is None and searched < MOST_SEARCHED:
            searched += 1
            best = nearest(candidates(module, network, name), module, run, culprit, before)
        if best is not None:
            usual[best[1].text] = best[1]
            causes[culprit] = in_words(best[1].text, before, best[0])
    return causes


def nearest(
    mistakes: Iterable[Mistake], module: nn.Module, run: Callable[[], Replay], culprit: str, before: float
) -> tuple[float, Mistake] | None:
    """The mistake that comes nearest to their output, and how near; None where none comes clearly nearer than ours."""
    best: tuple[float, Mistake] | None = None
    for mistake in mistakes:
        if not isinstance(module, mistake.kinds):
            continue
        after = distance_with(mistake, module, run, culprit)
        if after < math.inf and after * CLEARLY <= before and (best is None or after < best[0]):
            best = after, mistake
    return best


def in_words(mistake: str, before: float, after: float) -> str:
    return f"as {mistake}: the distance falls from {before:.1e} to {after:.1e}"


def distance_with(mistake: Mistake, module: nn.Module, run: Callable[[], Replay], culprit: str) -> float:
    """A culprit's own error against ours with a mistake; infinite where that cannot be made there."""
    with planted(module, mistake) as is_planted:
        if not is_planted:
            return math.inf
        try:
            return worst(run().checks, culprit)
        except (RuntimeError, IndexError, ValueError):  # shapes that the mistake does not fit
            return math.inf


def worst(checks: Sequence[Check], point: str) -> float:
    """A point's own error, of those of its numbers that have our shape where there are any."""
    errors = [check.own.relative_l2 for check in checks if check.point == point]
    return max((error for error in errors if error < math.inf), default=max(errors, default=0.0))


def candidates(module: nn.Module, network: nn.Module, name: str) -> Iterator[Mistake]:
    """The mistakes that this module could have: those of its class, and its neighbours' weights."""
    for mistake in MISTAKES:
        if isinstance(module, mistake.kinds):
            yield mistake
    if not isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
        return
    parent_name, _, own_name = name.rpartition(".")
    for other_name, other in network.get_submodule(parent_name).named_children():
        if other_name != own_name and type(other) is type(module) and other.weight.shape == module.weight.shape:
            yield Mistake(f"{own_name} with the weights of {other_name}", (type(module),), _weights_of(other))


def _weights_of(other: Any) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    def plant(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            kept = dict(module._parameters)
            for parameter in ("weight", "bias"):
                if kept.get(parameter) is not None:
                    module._parameters[parameter] = nn.Parameter(getattr(other, parameter).to(x.dtype), False)
            try:
                return type(module).forward(module, x)
            finally:
                module._parameters.update(kept)

        return forward

    return plant


@contextmanager
def planted(module: nn.Module, mistake: Mistake) -> Iterator[bool]:
    """A module with a mistake, in this block; whether there was one to make."""
    forward = mistake.plant(module)
    if forward is None:
        yield False
        return
    module.forward = forward
    try:
        with torch.no_grad():
            yield True
    finally:
        del module.forward
