"""A report as one page of HTML with nothing around it: bars, a curve over the steps, pictures side by side."""

import base64
import html
import io
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sdxl_ref.parity.report import Point, Report
from sdxl_ref.parity.tables import COLUMNS, name_of, number
from sdxl_ref.pictures.images import from_tensor

DECADES = (-5, 3)  # of the bars' axis: powers of ten, times the budget
STYLE = """
:root { color-scheme: light dark; --fault: #c0392b; --ok: #2471a3; --inherited: #95a5a6; --rule: #8888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { overflow-wrap: anywhere; }
code, .points td:first-child { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.points { width: 100%; }
td, th { padding: .15rem .5rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: normal; min-width: 9rem; }
.bars { position: relative; min-width: 10rem; width: 16rem; padding: 0; }
.bars i { display: block; height: .4rem; background: var(--inherited); }
.bars i:first-child { background: var(--ok); }
.fault .bars i:first-child { background: var(--fault); }
.bars b { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--rule); }
.fault td:first-child { font-weight: 700; color: var(--fault); }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 14rem; max-width: 22rem; }
figure img { width: 100%; image-rendering: pixelated; }
svg { width: 100%; max-width: 46rem; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(report: Report, title: str, settings: dict[str, Any] | None = None) -> str:
    """One page: the verdict, who is at fault and why, pictures, the steps as a curve, a row for each point in order."""
    body = "\n".join(sections(report, title, settings))
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{view}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def sections(report: Report, title: str, settings: dict[str, Any] | None) -> Iterator[str]:
    yield f"<h1>{html.escape(title)}: {report.verdict}</h1>"
    for culprit in report.culprits:
        cause = report.causes.get(culprit, "no known mistake explains it")
        yield f"<p><code>{html.escape(culprit)}</code>: {html.escape(cause)}</p>"
    yield from (f"<p>{html.escape(note)}</p>" for note in report.notes)
    if report.pictures is not None:
        yield pictures(*report.pictures)
    yield curve(report)
    yield points(report)
    if settings:
        told = "\n".join(f"{name}: {value}" for name, value in settings.items() if name != "budgets")
        yield f"<h2>Settings</h2><pre>{html.escape(told)}</pre>"


# --- points -------------------------------------------------------------------------------------------------------


def points(report: Report) -> str:
    names = ("point", "own and inherited, over the budget", *COLUMNS, "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    tenth = 10 ** ((DECADES[1] - DECADES[0]) / 10)
    told = (
        "In order of execution, of several calls the worst (#2: the third). The upper bar is a module's own error, "
        "or where that is not known the whole distance; the lower one is what it inherits. The line is the budget, "
        f"what rounding explains, and each tenth of the width a factor of {tenth:.1f}."
    )
    rows = "".join(map(row, report.points))
    return f'<h2>Points</h2><p>{told}</p><div class="scroll"><table class="points"><tr>{head}</tr>{rows}</table></div>'


def row(point: Point) -> str:
    error = point.relative_l2 if point.own is None else point.own
    bars = "".join(
        f'<i style="width:{share(value, point.budget):.1f}%" title="{number(value)}"></i>'
        for value in (error, point.inherited)
    )
    line = f'<b style="left:{share(point.budget, point.budget):.1f}%"></b>'
    figures = (point.relative_l2, point.allowed, point.own, point.budget, point.inherited)
    cells = "".join(f"<td>{number(value)}</td>" for value in figures)
    verdict = f"{point.verdict}{': ' * bool(point.note)}{html.escape(point.note)}"
    name = html.escape(name_of(point))
    drawn = f'<td class="bars">{bars}{line}</td>'
    return f'<tr class="{point.verdict}"><td>{name}</td>{drawn}{cells}<td>{verdict}</td></tr>'


def share(value: float | None, budget: float) -> float:
    """Of the bars' width, in percent: logarithmic, over the budget."""
    if value is None or value == 0:
        return 0.0
    if not math.isfinite(value) or budget <= 0:
        return 100.0
    low, high = DECADES
    return 100 * min(1.0, max(0.01, (math.log10(value / budget) - low) / (high - low)))


# --- steps --------------------------------------------------------------------------------------------------------


def curve(report: Report) -> str:
    """The distance after each of the sampler's steps, logarithmic; nothing for fewer than two."""
    steps = [p for p in report.points if p.name.startswith("sampler/") and 0 < p.relative_l2 < math.inf]
    if len(steps) < 2:
        return ""
    logs = [math.log10(point.relative_l2) for point in steps]
    low, high = math.floor(min(logs)), math.floor(max(logs)) + 1
    xs = [60 + 620 * i / (len(logs) - 1) for i in range(len(logs))]
    ys = [150 - 130 * (value - low) / (high - low) for value in logs]
    marks = "".join(f'<circle cx="{x:.0f}" cy="{y:.1f}" r="3"/>' for x, y in zip(xs, ys, strict=True))
    names = "".join(
        f'<text x="{x:.0f}" y="172" text-anchor="middle">{html.escape(point.name.removeprefix("sampler/"))}</text>'
        for x, point in zip(xs, steps, strict=True)
    )
    ticks = "".join(
        f'<text x="0" y="{154 - 130 * (power - low) / (high - low):.0f}">1e{power}</text>'
        for power in range(low, high + 1, max(1, (high - low) // 4))
    )
    line = " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    drawn = (
        '<svg viewBox="0 0 700 180" fill="currentColor" font-size="13" role="img" aria-label="by step">'
        f'{ticks}{names}<polyline fill="none" stroke="currentColor" stroke-width="2" points="{line}"/>{marks}</svg>'
    )
    return f"<h2>Distance after each step</h2>{drawn}"


# --- pictures -----------------------------------------------------------------------------------------------------


def pictures(expected: Tensor, found: Tensor) -> str:
    """The reference's picture, theirs, and the difference, so many times that its largest value can be seen."""
    gap = (found.float() - expected.float()).abs().nan_to_num(1.0, 1.0, 1.0)
    largest = float(gap.max())
    times = 10 ** min(9, max(0, math.floor(-math.log10(largest)))) if largest else 1
    shown = {"the reference": expected, "theirs": found, f"their difference, {times:,} times": gap * times}
    figures = "".join(
        f'<figure><img alt="{text}" src="data:image/png;base64,{png(images)}"><figcaption>{text}</figcaption></figure>'
        for text, images in shown.items()
    )
    told = f"The largest difference of a value is {largest:.1e} of the range, {255 * largest:.2g} of 255."
    return f'<h2>Pictures</h2><div class="pictures">{figures}</div><p>{told}</p>'


def png(images: Tensor) -> str:
    """The first picture of (b,3,H,W) in [0,1], in base64."""
    file = io.BytesIO()
    from_tensor(images[:1].nan_to_num())[0].save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
