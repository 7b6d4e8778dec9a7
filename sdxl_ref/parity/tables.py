"""A report as people read it: in a terminal, and as one page of HTML without anything around it."""

import html
import math
from collections.abc import Iterator
from typing import Any

from sdxl_ref.parity.report import Point, Report

HEAD = f"{'point':<58} {'relative':>9} {'own':>9} {'inherited':>9} {'budget':>9}  verdict"
LEAST = 1e-9  # the left end of the page's axis, times the budget


def lines(report: Report, every: bool = False) -> Iterator[str]:
    """The rows that are off, or all of them; then who is at fault and why."""
    shown = [point for point in report.points if every or point.verdict != "ok"]
    if shown:
        yield HEAD
    for point in shown[:MOST]:
        figures = " ".join(
            f"{number(value):>9}" for value in (point.relative_l2, point.own, point.inherited, point.budget)
        )
        name = point.name if len(point.name) <= 58 else f"…{point.name[-57:]}"
        yield f"{name:<58} {figures}  {point.verdict}{': ' * bool(point.note)}{point.note}"
    if len(shown) > MOST:
        yield f"… and {len(shown) - MOST} more"
    yield from (f"note: {note}" for note in report.notes)
    if report.agrees:
        yield f"agrees: {len(report.points)} points, each within what rounding explains"
    for culprit in report.culprits:
        yield f"differs at {culprit}" + (f": {report.causes[culprit]}" if culprit in report.causes else "")


MOST = 40


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


STYLE = """
:root { color-scheme: light dark; --own: #c0392b; --inherited: #7f8c8d; --ok: #2980b9; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .5rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; font-family: ui-monospace, monospace; font-size: 13px;
  white-space: normal; overflow-wrap: anywhere; }
.bar { display: inline-block; height: .6rem; vertical-align: middle; background: var(--ok); }
.fault .bar { background: var(--own); }
.inherits .bar { background: var(--inherited); }
.fault td:first-child { font-weight: 700; }
.scroll { overflow-x: auto; }
pre { white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
"""


def page(report: Report, title: str, settings: dict[str, Any] | None = None) -> str:
    """One page: the verdict, a bar for each point in order of execution, the steps as a curve."""
    parts = [f"<h1>{html.escape(title)}: {report.verdict}</h1>"]
    for culprit in report.culprits:
        cause = report.causes.get(culprit, "no known mistake explains it")
        parts.append(f"<p><code>{html.escape(culprit)}</code>: {html.escape(cause)}</p>")
    parts += [f"<p>{html.escape(note)}</p>" for note in report.notes]
    parts.append(curve(report))
    head = "".join(
        f"<th>{name}</th>" for name in ("point", "own / budget", "relative L2", "own", "inherited", "budget")
    )
    rows = "".join(map(row, report.points))
    parts.append(f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>')
    if settings:
        told = "\n".join(f"{name}: {value}" for name, value in settings.items() if name != "budgets")
        parts.append(f"<h2>Settings</h2><pre>{html.escape(told)}</pre>")
    body = "\n".join(parts)
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{view}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def row(point: Point) -> str:
    error = point.relative_l2 if point.own is None else point.own
    figures = (point.relative_l2, point.own, point.inherited, point.budget)
    cells = "".join(f"<td>{number(value)}</td>" for value in figures)
    bar = f'<span class="bar" style="width:{width(error, point.budget):.1f}rem" title="{number(error)}"></span>'
    return f'<tr class="{point.verdict}"><td>{html.escape(point.name)}</td><td>{bar}</td>{cells}</tr>'


def width(error: float, budget: float) -> float:
    """Of a bar, logarithmic: 6 rem at the budget, 1 for each factor of ten."""
    if not math.isfinite(error) or budget <= 0:
        return 12.0
    return min(12.0, max(0.1, 6.0 + math.log10(max(error, budget * 1e-6) / budget)))


def curve(report: Report) -> str:
    """The distance along the sampler's steps, logarithmic."""
    steps = [point for point in report.points if point.name.startswith("sampler/") and point.relative_l2 > 0]
    if len(steps) < 2:
        return ""
    logs = [math.log10(point.relative_l2) for point in steps if math.isfinite(point.relative_l2)]
    low, high = math.floor(min(logs)), math.ceil(max(logs)) or 1
    spots = [
        f"{40 + 320 * i / (len(logs) - 1):.0f},{110 - 100 * (value - low) / max(1, high - low):.0f}"
        for i, value in enumerate(logs)
    ]
    labels = f'<text x="0" y="14">1e{high}</text><text x="0" y="114">1e{low}</text>'
    line = f'<polyline fill="none" stroke="currentColor" stroke-width="2" points="{" ".join(spots)}"/>'
    size = 'viewBox="0 0 380 130" width="380" fill="currentColor"'
    drawn = f'<svg {size} role="img" aria-label="distance after each step">{labels}{line}</svg>'
    return f"<h2>Distance after each step</h2>{drawn}"
