"""A report as people read it in a terminal."""

import math
from collections.abc import Iterator

from sdxl_ref.parity.report import Report

HEAD = f"{'point':<58} {'relative':>9} {'own':>9} {'inherited':>9} {'budget':>9}  verdict"
MOST = 40  # rows


def lines(report: Report, every: bool = False) -> Iterator[str]:
    """The rows that are off, or all of them; then who is at fault and why."""
    shown = [point for point in report.points if every or point.verdict != "ok"]
    if shown:
        yield HEAD
    cut = shown if every else shown[:MOST]
    for point in cut:
        figures = " ".join(
            f"{number(value):>9}" for value in (point.relative_l2, point.own, point.inherited, point.budget)
        )
        name = point.name if len(point.name) <= 58 else f"…{point.name[-57:]}"
        yield f"{name:<58} {figures}  {point.verdict}{': ' * bool(point.note)}{point.note}"
    if len(cut) < len(shown):
        yield f"… and {len(shown) - len(cut)} more: --all prints them"
    yield from (f"note: {note}" for note in report.notes)
    if report.agrees:
        yield f"agrees: {len(report.points)} points, each within what rounding explains"
    for culprit in report.culprits:
        yield f"differs at {culprit}" + (f": {report.causes[culprit]}" if culprit in report.causes else "")


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
