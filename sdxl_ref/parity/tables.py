"""A report as people read it in a terminal."""

import math
from collections.abc import Iterator

from sdxl_ref.parity.report import Point, Report

COLUMNS = ("relative", "allowed", "own", "budget", "inherited")
WIDTH = 58  # of the names
MOST = 40  # rows


def lines(report: Report, every: bool = False) -> Iterator[str]:
    """The points at fault, or all of them; then who is at fault and why."""
    chosen = [point for point in report.points if every or point.verdict == "fault"]
    shown = chosen if every else chosen[:MOST]
    if shown:
        yield f"{'point':<{WIDTH}} " + " ".join(f"{name:>9}" for name in COLUMNS) + "  verdict"
        yield from map(row, shown)
    if len(shown) < len(chosen):
        yield f"… and {len(chosen) - len(shown)} more"
    inherits = sum(point.verdict == "inherits" for point in report.points)
    if inherits and not every:
        yield f"{inherits} others inherit an error; --all prints every point"
    yield from (f"note: {note}" for note in report.notes)
    if report.agrees:
        yield f"agrees: {len(report.points)} points, each within what rounding explains"
    for culprit in report.culprits:
        yield f"differs at {culprit}" + (f": {report.causes[culprit]}" if culprit in report.causes else "")


def row(point: Point) -> str:
    name = name_of(point)
    name = name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}"
    values = (point.relative_l2, point.allowed, point.own, point.budget, point.inherited)
    figures = " ".join(f"{number(value):>9}" for value in values)
    return f"{name:<{WIDTH}} {figures}  {point.verdict}{': ' * bool(point.note)}{point.note}"


def name_of(point: Point) -> str:
    """With the call that the figures are of, where it is not the first."""
    return f"{point.name}#{point.call}" if point.call else point.name


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
