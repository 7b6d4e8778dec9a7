"""Two traces of one run: two machines, two versions, packed and plain."""

import math

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.parity.report import LEAST, Point, Report, apart_from, missing_points, pictures_of
from sdxl_ref.parity.trace import Key, Trace

VERDICTS = ("ok", "inherits", "fault")
GROWTH = 32.0  # times its input's distance: what a module may make of it


def compare_traces(reference: Trace, candidate: Trace) -> Report:
    """Where the second one starts to differ from the first, by more than rounding of the narrower dtype explains.

    A module is at fault whose output is much further off than what it was handed (where inputs were not recorded, than
    all that came before it), unless one inside it is. InputError for traces without a common point.
    """
    common = [key for key in reference.outputs() if key in candidate]
    if not common:
        raise InputError(f"the traces have no point in common: {reference.points()[:3]} and {candidate.points()[:3]}")
    report = Report()
    rows: dict[str, Point] = {}
    faults: list[Key] = []
    before = 0.0
    is_spoiled = False  # of values that are not finite the first one is at fault
    for key in common:
        apart = apart_from(candidate.get(key), reference.get(key))
        row = rows.setdefault(key.point, Point(key.point))
        if apart is None:
            row.verdict, row.note = "fault", "of another shape"
            report.culprits += [key.point] * (key.point not in report.culprits)
            continue
        handed = inputs_apart(key, reference, candidate)
        limit = max(GROWTH * (before if handed is None else handed), 16 * LEAST * roundoff(key, reference, candidate))
        if math.isnan(limit):  # what it was handed is not finite
            limit = math.inf
        is_later = holds(key, faults) or (is_spoiled and not math.isfinite(apart.relative_l2))
        verdict = "ok" if apart.relative_l2 <= limit else "inherits" if is_later else "fault"
        is_spoiled |= not math.isfinite(apart.relative_l2)
        if verdict == "fault":
            faults.append(key)
            report.culprits += [key.point] * (key.point not in report.culprits)
        if VERDICTS.index(verdict) > VERDICTS.index(row.verdict) or (
            verdict == row.verdict and not apart.relative_l2 < row.relative_l2
        ):
            row.relative_l2, row.max_abs, row.cosine, row.ulp = apart
            row.call, row.verdict, row.inherited = key.call, verdict, handed
            row.budget = row.allowed = limit
        before = max(before, apart.relative_l2 if math.isfinite(apart.relative_l2) else 0.0)
    report.points = list(rows.values())
    report.pictures = pictures_of(reference, candidate)
    for one, other, where in ((reference, candidate, "the second trace"), (candidate, reference, "the first trace")):
        missing = [key.point for key in one.outputs() if key not in other]
        if missing:
            report.notes.append(missing_points(missing, where))
    return report


def holds(key: Key, faults: list[Key]) -> bool:
    """Whether a module that is at fault in the same call lies inside this one."""
    inside = (f"{key.point}.", f"{key.point}/")
    return any(fault.point.startswith(inside) and fault.call == key.call for fault in faults)


def inputs_apart(key: Key, reference: Trace, candidate: Trace) -> float | None:
    """The largest distance of what a module was handed; None where that is not known."""
    found = []
    for i in range(8):
        handed = key._replace(value=f"in.{i}")
        if handed in reference and handed in candidate:
            apart = apart_from(candidate.get(handed), reference.get(handed))
            found += [] if apart is None else [apart.relative_l2]
    return max(found, default=None)


def roundoff(key: Key, reference: Trace, candidate: Trace) -> float:
    """Of the narrower dtype."""
    eps = []
    for trace in (reference, candidate):
        value = trace.get(key)
        dtype = value.dtype if isinstance(value, Tensor) else getattr(torch, value.dtype) if value else torch.float32
        eps.append(torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0)
    return max(eps)
