"""Two traces of one run: two machines, two versions, packed and plain."""

import math

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.parity.report import LEAST, Point, Report, apart_from, pictures_of
from sdxl_ref.parity.trace import Key, Trace

GROWTH = 32.0  # times its input's distance: what a module may make of it


def compare_traces(reference: Trace, candidate: Trace) -> Report:
    """Where the second one starts to differ from the first, by more than rounding of the narrower dtype explains.

    A module is at fault whose output is much further off than what it was handed; where inputs were not recorded, than
    all that came before it. InputError for traces without a common point.
    """
    common = [key for key in reference.outputs() if key in candidate]
    if not common:
        raise InputError(f"the traces have no point in common: {reference.points()[:3]} and {candidate.points()[:3]}")
    report = Report()
    rows: dict[str, Point] = {}
    before = 0.0
    for key in common:
        apart = apart_from(candidate.get(key), reference.get(key))
        row = rows.setdefault(key.point, Point(key.point))
        if apart is None:
            row.verdict, row.note = "fault", "of another shape"
            report.culprits += [key.point] * (key.point not in report.culprits)
            continue
        handed = inputs_apart(key, reference, candidate)
        limit = max(GROWTH * (before if handed is None else handed), 16 * LEAST * roundoff(key, reference, candidate))
        if not apart.relative_l2 < row.relative_l2:
            row.relative_l2, row.max_abs, row.cosine, row.ulp = apart
            row.budget, row.inherited = limit, handed
        if not apart.relative_l2 <= limit:
            row.verdict = "fault"
            report.culprits += [key.point] * (key.point not in report.culprits)
        before = max(before, apart.relative_l2 if math.isfinite(apart.relative_l2) else 0.0)
    report.points = list(rows.values())
    report.pictures = pictures_of(reference, candidate)
    missing = [key.point for key in reference.outputs() if key not in candidate]
    missing += [key.point for key in candidate.outputs() if key not in reference]
    if missing:
        report.notes.append(f"{len(set(missing))} points are in one of them alone, such as {missing[0]}")
    return report


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
