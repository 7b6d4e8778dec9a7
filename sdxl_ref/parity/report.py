"""What a comparison found: each point with its errors and the budget, who is at fault, and why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdxl_ref.parity.replay import Check, Difference, Replay, difference, fitted, ways_into
from sdxl_ref.parity.sketch import Sketch, sketch
from sdxl_ref.parity.sketch import distance as sketch_distance
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.weights.checkpoint import PARTS

FACTOR = 8.0  # times our own rounding error: what legitimate rewrites stay under, and planted faults do not
LEAST = 4.0  # units of roundoff that every module may be off, where ours happens to be exact
BETWEEN = 64.0  # and what is between the networks: several operations in float32, in any order
NARROW = 8.0  # of those, where their numbers are kept in fewer bits
RESULT = Key("picture")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Budget:
    """What rounding explains, by key: of a module alone (`own`), and along the run."""

    own: dict[str, float]
    run: dict[str, float]
    dtype: torch.dtype

    def widened(self, other: "Budget") -> "Budget":
        """What two runs of ours allow together: the same sums in two orders."""
        own = {key: max(self.own.get(key, 0.0), other.own.get(key, 0.0)) for key in self.own | other.own}
        run = {key: max(self.run.get(key, 0.0), other.run.get(key, 0.0)) for key in self.run | other.run}
        return Budget(own, run, self.dtype)

    @classmethod
    def measured(cls, replay: Replay, trace: Trace, truth: Trace, dtype: torch.dtype) -> "Budget":
        """Of our own run in a dtype: its trace, that trace's replay, and the run in float64."""
        own: dict[str, float] = {}
        for check in replay.checks:
            own[str(check.key)] = max(own.get(str(check.key), 0.0), rounded(check.own.relative_l2))
        run = {}
        for key in trace.outputs():
            value, expected = trace.get(key), truth.get(key)
            apart = None if value is None or expected is None else apart_from(value, expected)
            if apart is not None:
                run[str(key)] = rounded(apart.relative_l2)
        return cls(own, run, dtype)

    def of_own(self, check: Check) -> float:
        keys = (*check.since, check.key)
        error = sum(self.own.get(str(key), self.own.get(str(key._replace(call=0)), 0.0)) for key in keys)
        if check.since:  # what is not met in a long stretch adds up less than in a sum
            error = min(error, max(self.run.get(str(check.key), error), self.own.get(str(check.key), 0.0)))
        return max(FACTOR * error, least(check.point, check.dtype, self.dtype))

    def of_run(self, key: Key) -> float:
        return max(FACTOR * self.run.get(str(key), 0.0), least(key.point, self.dtype, self.dtype))


def rounded(value: float) -> float:
    """Three digits are enough for a budget."""
    return float(f"{value:.2e}")


def least(point: str, dtype: torch.dtype, run: torch.dtype) -> float:
    """What a point may be off in a dtype, where ours happens to be exact. Whole numbers must be equal.

    Between the networks it is the run's dtype that counts: guidance, say, may be computed in it.
    """
    if not dtype.is_floating_point:
        return 1e-12
    is_network = point.removeprefix("refiner/").split("/")[0] in PARTS
    if is_network:
        return LEAST * torch.finfo(dtype).eps / 2
    return (BETWEEN if run == torch.float32 else NARROW) * torch.finfo(run).eps / 2


@dataclass
class Point:
    """A row of the table; of several calls the worst. Names of the fields are those of the JSON.

    `verdict`: "ok"; "fault" for an error of its own beyond `budget` (or, where that is not known, for the first that
    is beyond `allowed`); "inherits" for the others that are beyond `allowed`.
    """

    name: str
    call: int = 0  # whose figures they are: 2 is the third evaluation
    relative_l2: float = 0.0  # from the reference's run
    allowed: float = 0.0  # for that: what rounding adds up to along the run
    max_abs: float = 0.0
    cosine: float = 1.0
    ulp: float = 0.0
    own: float | None = None  # of the module alone, on their input
    inherited: float | None = None  # of our module on their input
    budget: float = 0.0  # for `own`; where that is not known, `allowed`
    verdict: str = "ok"
    note: str = ""


@dataclass
class Report:
    """`verdict` is "agrees" or "differs"; `culprits` are in order of completion, `causes` says what explains them."""

    points: list[Point] = field(default_factory=list)
    culprits: list[str] = field(default_factory=list)
    causes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: tuple[Tensor, Tensor] | None = None  # the reference's and theirs, (b,3,H,W) in [0,1]; not in the JSON

    @property
    def agrees(self) -> bool:
        return not self.culprits

    @property
    def verdict(self) -> str:
        return "agrees" if self.agrees else "differs"

    @property
    def first(self) -> str | None:
        return self.culprits[0] if self.culprits else None

    def as_json(self) -> dict[str, Any]:
        """As `--json` writes it; what is not finite is null."""
        points = [{name: _finite(value) for name, value in vars(point).items()} for point in self.points]
        head = {"verdict": self.verdict, "first": self.first, "culprits": self.culprits, "causes": self.causes}
        return head | {"points": points, "notes": self.notes}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge(
    checks: list[Check], inherited: Mapping[Key, float], theirs: Trace, reference: Trace, budget: Budget
) -> Report:
    """The report of a replay: a point is at fault where its own error is more than rounding explains."""
    report = Report()
    rows: dict[str, Point] = {}
    off: dict[Key, float] = {}
    for key in reference.outputs():
        row = rows.setdefault(key.point, Point(key.point))
        value, expected = theirs.get(key), reference.get(key)
        if value is None or expected is None:
            continue
        apart = apart_from(value, expected)
        off[key] = math.inf if apart is None else apart.relative_l2
        limit = budget.of_run(key)
        if apart is None:
            row.note = "of another shape"
        elif not math.isfinite(apart.relative_l2):
            row.note = "not finite"
            row.relative_l2 = row.max_abs = math.inf
        elif not row.allowed or apart.relative_l2 / limit > row.relative_l2 / row.allowed:
            row.relative_l2, row.max_abs, row.cosine, row.ulp = apart
            row.call, row.allowed = key.call, limit
        if key in inherited:
            row.inherited = max(row.inherited or 0.0, inherited[key])
    for check in checks:
        row = rows.setdefault(check.point, Point(check.point))
        limit = budget.of_own(check)
        error = check.own.relative_l2
        if row.own is None or not error / limit <= row.own / row.budget:
            row.own, row.budget = error, limit
        row.note = check.note or row.note
        if not error <= limit:  # NaN is no agreement
            if row.verdict != "fault":
                row.call = check.key.call
            row.verdict = "fault"
            report.culprits += [check.point] * (check.point not in report.culprits)
    _along_the_run(rows, off, budget, report)
    report.pictures = pictures_of(reference, theirs)
    report.points = [row for row in rows.values() if row.own is not None or row.note or row.name in theirs.points()]
    missing = [key.point for key in reference.outputs() if key not in theirs]
    if missing:
        report.notes.append(missing_points(missing, "the trace"))
    return report


def missing_points(points: list[str], where: str) -> str:
    points = list(dict.fromkeys(points))
    return f"{len(points)} points are not in {where}: {', '.join(points[:3])}{', …' * (len(points) > 3)}"


def _along_the_run(rows: dict[str, Point], off: Mapping[Key, float], budget: Budget, report: Report) -> None:
    """Points whose own error is fine, or not known: those that inherit one, and where nothing is known the first."""
    for key, error in off.items():
        row = rows[key.point]
        if row.verdict == "fault":
            continue
        limit = budget.of_run(key)
        if row.own is None:
            row.budget = limit
        if not error <= limit:
            row.verdict = "inherits" if row.own is not None or report.culprits else "fault"
            if row.verdict == "fault":
                report.culprits.append(key.point)
                report.notes.append(
                    f"{key.point} is the first that is off: own and inherited errors cannot be told apart"
                )


def pictures_of(reference: Trace, theirs: Trace) -> tuple[Tensor, Tensor] | None:
    """The results of two runs, where both are there whole and of one size."""
    expected, found = reference.tensor(RESULT), theirs.tensor(RESULT)
    if expected is None or found is None or expected.shape != found.shape:
        return None
    if expected.ndim != 4 or expected.shape[1] != 3 or not expected.numel():
        return None
    return expected, found


def apart_from(value: Any, expected: Any) -> Difference | None:
    """The difference of two tensors, or of what is kept of them; None where they are of two shapes."""
    if isinstance(value, Sketch) or isinstance(expected, Sketch):
        b = expected if isinstance(expected, Sketch) else sketch(expected)
        forms = [value] if isinstance(value, Sketch) else [sketch(way) for way in ways_into(value, b.shape)]
        a = min(forms, key=lambda form: sketch_distance(form, b), default=None)
        if a is None or a.shape != b.shape:
            return None
        gap = sketch_distance(a, b)
        return Difference(gap / b.norm if b.norm else gap, max(abs(a.high - b.high), abs(a.low - b.low)), 1.0, 0.0)
    fit = fitted(value, expected)
    return None if fit is None else difference(fit, expected, value.dtype)
