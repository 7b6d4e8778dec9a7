"""Time and memory of this package beside others', in turns, on generated files of full size: `make bench`.

Every figure comes from a fresh process. A ratio is over diffusers' in the same turn, the median over the turns: less
is better. The files are generated once (tests/full/full_file.py); nothing is downloaded. `--only` runs a part, and
`--json FILE` keeps the figures of the others that are in the file already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "full")]

from measure import measure  # noqa: E402

from sdxl_ref.cli import YIELDING  # noqa: E402

PHOTO = HERE.parent / "sdxl_ref" / "data" / "photo.jpg"
OURS, DIFFUSERS = "ours, packed", "diffusers"
ALLOCATORS = {  # preloaded, as PyTorch's tuning guide for CPUs has it
    "diffusers, jemalloc": {
        "LD_PRELOAD": "libjemalloc.so.2",
        "MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto",
    },
    "diffusers, tcmalloc": {"LD_PRELOAD": "libtcmalloc_minimal.so.4"},
}
COMPILED = ("ours, compiled", "diffusers, compiled")  # which takes minutes
CONTESTANTS = (OURS, "ours, plain", DIFFUSERS, *ALLOCATORS, "OpenVINO", *COMPILED)
IMPORTS = {
    OURS: "import sdxl_ref; from sdxl_ref import ImageToImagePipeline",
    DIFFUSERS: "from diffusers import StableDiffusionXLImg2ImgPipeline",
}
PACKAGES = ("sdxl-ref", "torch", "diffusers", "transformers", "safetensors", "accelerate", "openvino")
OUR_ENVIRONMENT = dict([YIELDING])  # as the commands set it
DTYPES = ("bfloat16", "float32")
BUSY = (
    "import numpy as np; a, b = np.ones(1 << 28), np.ones(1 << 28)\n"  # 4 GB that move, on one core
    "print(flush=True)\nwhile True: np.copyto(a, b)"
)
Figures = dict[str, Any]  # by contestant


class Plan(NamedTuple):
    """What is measured in one process of each contestant: some cases of a part of a model, so many turns."""

    kind: str
    part: str
    dtype: str
    cases: tuple[str, ...]
    turns: int = 5
    contestants: tuple[str, ...] = CONTESTANTS
    steady: tuple[str, ...] = (OURS, DIFFUSERS)  # who runs in every turn: the others in the first one, three calls
    busy: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.kind, self.part, self.dtype, *self.cases, *["busy"] * self.busy])


STEADY = (OURS, DIFFUSERS, "OpenVINO")
EAGER = tuple(name for name in CONTESTANTS if name not in COMPILED)
PLANS = {
    "unet": [*(Plan("refiner", "unet", dtype, ("512x1", "512x2"), 5, EAGER, STEADY) for dtype in DTYPES)],
    "busy": [Plan("refiner", "unet", "bfloat16", ("512x1", "512x2"), 5, (OURS, DIFFUSERS), busy=True)],
    "compiled": [Plan("refiner", "unet", dtype, ("512x2",), 1, (OURS, DIFFUSERS, *COMPILED)) for dtype in DTYPES],
    "sizes": [
        Plan(kind, "unet", dtype, ("256x1", "256x2", *extra, "1024x1", "1024x2"), 1, STEADY)
        for kind, extra in (("refiner", ()), ("base", ("512x1", "512x2")))
        for dtype in DTYPES
    ],
    "towers": [
        Plan(kind, part, dtype, ("1", "2"), 5, EAGER)
        for kind, part in (("refiner", "text_encoder_2"), ("base", "text_encoder"))
        for dtype in DTYPES
    ],
    "vae": [
        Plan("refiner", part, dtype, (pixels,), 5 if (dtype, part) == ("float32", "decoder") else 1, EAGER)
        for pixels in ("512", "1024")
        for part in ("decoder", "encoder")
        for dtype in DTYPES
    ],
}
WHOLE = ("import", "open", "warm", "cold")
PROFILES = "profiles"  # where the time of the UNet goes at batch 2
PARTS = (*PLANS, *WHOLE, PROFILES)


def child(*command: object, **environment: str) -> tuple[Figures, float, int]:
    """A Python process that finds the tests' helpers and asks no network: its last line, its seconds and its peak."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "full"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment
    found = measure([sys.executable, *map(str, command)], **environment)
    last = found.output.strip().splitlines()[-1] if found.output.strip() else "{}"
    return (json.loads(last) if last.startswith("{") else {"printed": last}), found.seconds, found.peak


# --- one network --------------------------------------------------------------------------------------------------


def run_plan(plan: Plan, folder: Path, turns: int) -> dict[str, Figures]:
    """For each contestant the turns' figures; a contestant that ends early (memory, a missing library) says why."""
    file = folder / f"random_{plan.kind}.safetensors"
    results: dict[str, Figures] = {}
    with busy() if plan.busy else nullcontext():
        for turn in range(turns or plan.turns):
            order = plan.contestants if turn % 2 == 0 else tuple(reversed(plan.contestants))
            for contestant in order:
                if "missing" in results.get(contestant, {}) or (turn > 0 and contestant not in plan.steady):
                    continue
                name = DIFFUSERS if contestant in ALLOCATORS else contestant
                command = [HERE / "contestants.py", name, file, folder, plan.part, plan.dtype, *plan.cases]
                command += ["--calls", 1 if contestant in plan.steady else 3]
                try:
                    found, _, _ = child(*command, **environment_of(contestant))
                except RuntimeError as error:
                    results[contestant] = {"missing": reason(error)}
                    say(f"  {contestant}: {results[contestant]['missing']}")
                    continue
                mine = results.setdefault(contestant, {case: [] for case in plan.cases} | {"peak": []})
                mine["peak"].append(found["peak"])
                for case in plan.cases:
                    mine[case].append(found[case])
                shown = "  ".join(f"{case} {statistics.median(found[case]['seconds']):.2f}" for case in plan.cases)
                say(f"  {contestant:<20} {shown}, peak {gb(found['peak'])}")
    return results


def environment_of(contestant: str) -> dict[str, str]:
    return OUR_ENVIRONMENT if contestant.startswith("ours") else ALLOCATORS.get(contestant, {})


def run_profiles(folder: Path) -> Iterator[tuple[str, dict[str, Figures]]]:
    """By contestant the operators of one evaluation: [calls, seconds]."""
    for dtype in DTYPES:
        found = {}
        for contestant in STEADY:
            command = [HERE / "contestants.py", contestant, folder / "random_refiner.safetensors", folder]
            command += ["unet", dtype, "512x2", "--profile"]
            found[contestant] = child(*command, **environment_of(contestant))[0]["512x2"]
            say(f"  {contestant}")
        yield f"profile {dtype}", found


def profile_lines(name: str, figures: dict[str, Figures]) -> Iterator[str]:
    """Each contestant's operators beside the others', the longest ones."""
    yield f"Operators of one evaluation, 512 px, batch 2, {name.removeprefix('profile ')}: calls, seconds."
    yield ""
    columns = [[f"{op}: {calls}, {took:.2f} s" for op, (calls, took) in list(f.items())[:8]] for f in figures.values()]
    rows = [list(figures), ["---"] * len(figures), *map(list, zip_longest(*columns, fillvalue=""))]
    rows.append([f"all: {sum(took for _, took in f.values()):.2f} s" for f in figures.values()])
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "killed, memory was short" if "ended with 247" in lines[0] else lines[-1][:120]  # 247: SIGKILL


@contextmanager
def busy() -> Iterator[None]:
    """A second process that keeps one core busy and 4 GB of memory moving."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(figures: Figures, case: str) -> list[float]:
    return [statistics.median(turn["seconds"]) for turn in figures[case]]


def ratio(figures: dict[str, Figures], contestant: str, values: Callable[[Figures], list[float]]) -> float | None:
    """The median of the turns' ratios over diffusers: what slows a whole turn down falls out of it."""
    if DIFFUSERS not in figures or "missing" in figures[DIFFUSERS] or contestant == DIFFUSERS:
        return None
    pairs = zip(values(figures[contestant]), values(figures[DIFFUSERS]), strict=False)
    return statistics.median(a / b for a, b in pairs)


def network_rows(plan: Plan, figures: dict[str, Figures], bounds: Figures) -> Iterator[list[str]]:
    """A row for each case, a cell for each contestant, and one for the peaks."""
    for case in plan.cases:
        row = [f"{plan.kind} {plan.part} {case}, {plan.dtype}{', busy machine' * plan.busy}", bound(plan, case, bounds)]
        for contestant in CONTESTANTS:
            mine = figures.get(contestant, {"missing": ""})
            if "missing" in mine:
                row.append(mine["missing"] and "none (1)")
                continue
            share = ratio(figures, contestant, lambda f, case=case: seconds(f, case))  # type: ignore[misc]
            cell = f"{statistics.median(seconds(mine, case)):.3g} s"
            row.append(cell if share is None else f"{cell}, {share:.2f}")
        yield row
    peaks = [
        "" if "missing" in mine else gb(statistics.median(mine["peak"]))
        for mine in (figures.get(contestant, {"missing": ""}) for contestant in CONTESTANTS)
    ]
    yield ["· peak of the process", "", *peaks]


def bound(plan: Plan, case: str, bounds: Figures) -> str:
    """Operations over rates, in seconds."""
    counts = bounds.get("operations", {}).get(f"{plan.kind} {plan.part} {case}")
    if counts is None:
        return ""
    rates = bounds["rates"][plan.dtype]
    return f"{sum(counts[name] / rates[name] for name in counts):.3g} s"


# --- the whole ----------------------------------------------------------------------------------------------------


def by_turns(run: Callable[[str], Figures], sides: Sequence[str], turns: int) -> dict[str, Figures]:
    """Each side `turns` times; who begins changes. Lists of what the runs return, by its names."""
    results: dict[str, Figures] = {side: {} for side in sides}
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found = run(side)
            for name, value in found.items():
                results[side].setdefault(name, []).append(value)
            say(f"  {side:<14} " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return results


def run_whole(part: str, folder: Path, turns: int) -> Iterator[tuple[str, dict[str, Figures]]]:
    file, config = folder / "random_refiner.safetensors", folder / "diffusers"
    sides = (OURS, DIFFUSERS)
    if part == "import":
        timed = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
        for side in sides:  # once unseen, for the page cache
            child("-c", timed.format(IMPORTS[side]))
        run = lambda side: {"seconds": float(child("-c", timed.format(IMPORTS[side]))[0]["printed"])}  # noqa: E731
        yield "import of the pipeline", by_turns(run, sides, turns or 5)
    if part == "open":
        for dtype in ("float16", *DTYPES):
            everybody = sides if dtype == "float16" else (OURS, "ours, plain", DIFFUSERS)
            plain = ("ours, plain", DIFFUSERS) if dtype == "float16" else everybody

            def opened(side: str, dtype: str = dtype) -> Figures:
                warm(file)
                found, _, peak = child(HERE / "whole.py", side, file, config, dtype)
                return {"seconds": found["opened"], "peak": peak}

            yield f"open the float16 file as {dtype}", by_turns(opened, plain, turns or 5)
    if part == "warm":
        for dtype, runs in (("bfloat16", ("2x512", "2x512", "2x256", "8x256")), ("float32", ("2x512", "2x512"))):

            def worked(side: str, dtype: str = dtype, runs: tuple[str, ...] = runs) -> Figures:
                warm(file)
                found, _, peak = child(HERE / "whole.py", side, file, config, dtype, *runs, **environment_of(side))
                growth = {f"run {run}": value for run, value in zip(runs[2:], found["seconds"][2:], strict=True)}
                return {"seconds": found["seconds"][1], "peak": peak} | growth

            yield f"warm run, 512 px, 2 steps, {dtype}", by_turns(worked, sides, turns or (5 if runs[2:] else 3))
    if part == "cold":
        for dtype, vae in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")):
            what = f"cold run to PNG, 512 px, 3 steps, {dtype}" + f", our VAE in {vae}" * (dtype == "bfloat16")
            yield what, by_turns(lambda side, d=dtype, v=vae: cold(side, d, v, folder), sides, turns or 5)  # type: ignore[misc]


def cold(side: str, dtype: str, vae: str, folder: Path) -> Figures:
    """Process start to PNG; each side's own defaults for all that is not named."""
    file, out = folder / "random_refiner.safetensors", folder / "out.png"
    options = [PHOTO, "--checkpoint", file, "--out", out, "--prompt", "a cup of coffee on a wooden table"]
    options += ["--steps", 10, "--strength", 0.3, "--guidance-scale", 5, "--seed", 0, "--dtype", dtype]
    programs = {
        OURS: ["-m", "sdxl_ref", "refine", "--vae-dtype", vae],
        DIFFUSERS: [TESTS / "full" / "diffusers_refine.py", "--folder", folder / "diffusers"],
    }
    warm(file)
    out.unlink(missing_ok=True)
    _, took, peak = child(*programs[side], *options)
    assert out.stat().st_size > 0
    return {"seconds": took, "peak": peak}


def whole_rows(what: str, figures: dict[str, Figures]) -> Iterator[list[str]]:
    for name in next(iter(figures.values())):
        show = gb if name == "peak" else "{:.2f} s".format
        row = [what if name == "seconds" else f"· {name}"]
        for side in (OURS, "ours, plain", DIFFUSERS):
            if side not in figures:
                row.append("")
                continue
            share = ratio(figures, side, lambda f, name=name: f[name])  # type: ignore[misc]
            cell = show(statistics.median(figures[side][name]))
            row.append(cell if share is None else f"{cell}, {share:.2f}")
        yield row


# --- the table ----------------------------------------------------------------------------------------------------


def growth(results: Figures) -> list[str]:
    """Exponents: what the time grows with, as a power."""
    import math

    notes = []
    for plan in PLANS["sizes"]:
        figures = results.get(plan.name, {})
        for contestant in (OURS, DIFFUSERS):
            mine = figures.get(contestant, {"missing": ""})
            if "missing" in mine:
                continue
            times = {case: statistics.median(seconds(mine, case)) for case in plan.cases}
            pixels = math.log(times["1024x1"] / times["256x1"], 16)
            batch = math.log(times["256x2"] / times["256x1"], 2)
            notes.append(
                f"{plan.kind}, {plan.dtype}, {contestant}: time grows with pixels^{pixels:.2f} and batch^{batch:.2f}"
            )
    warm_run = results.get("warm run, 512 px, 2 steps, bfloat16", {})
    for contestant, mine in warm_run.items():
        few, many = (statistics.median(mine[f"run {steps}x256"]) for steps in (2, 8))
        notes.append(f"a warm run at 256 px, {contestant}: steps^{math.log(many / few, 4):.2f}")
    return notes


def markdown(results: Figures) -> str:
    bounds = results.get("bounds", {})
    networks = [["", "lower bound", *CONTESTANTS]]
    whole = [["", OURS, "ours, plain", DIFFUSERS]]
    profiles: list[str] = []
    plans = {plan.name: plan for plans in PLANS.values() for plan in plans}
    for name, figures in results.items():
        if name in plans:
            networks += network_rows(plans[name], figures, bounds)
        elif name.startswith("profile "):
            profiles += profile_lines(name, figures)
        elif name not in ("bounds", "machine"):
            whole += whole_rows(name, figures)
    missing = {
        f"{contestant}, {name}: {mine['missing']}"
        for name, figures in results.items()
        if name in plans
        for contestant, mine in figures.items()
        if mine.get("missing")
    }
    lines: list[str] = []
    for table in (networks, whole):
        if len(table) > 1:
            rows = [table[0], ["---"] * len(table[0]), *table[1:]]
            lines += ["| " + " | ".join(cells) + " |" for cells in rows] + [""]
    notes = [*(f"(1) {text}." for text in sorted(missing)), *growth(results)]
    notes += [f"{dtype}: " + rates_of(bounds, dtype) for dtype in DTYPES if bounds]
    notes += [f"page faults of a call at 512 px, batch 1, {dtype}: " + faults(results, dtype) for dtype in DTYPES]
    notes += [f"{name}: {text}" for name, text in results["machine"].items()]
    return "\n".join([*lines, *profiles, *(f"- {note}" for note in notes), ""])


def rates_of(bounds: Figures, dtype: str) -> str:
    return ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in bounds["rates"][dtype].items())


def faults(results: Figures, dtype: str) -> str:
    figures = results.get(Plan("refiner", "unet", dtype, ("512x1", "512x2")).name, {})
    counts = {name: mine["512x1"] for name, mine in figures.items() if "missing" not in mine}
    return ", ".join(f"{name} {statistics.median(t['faults'] for t in turns):,.0f}" for name, turns in counts.items())


def machine() -> dict[str, str]:
    """What the figures were taken on, without names or paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return {
        "Machine": f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
        "Versions": ", ".join([f"Python {platform.python_version()}", *found]),
    }


def warm(file: Path) -> None:
    """Read the file once, so that it lies in the page cache for whoever is next."""
    with file.open("rb") as f:
        while f.read(1 << 24):
            pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part, or several; else all")
    parser.add_argument("--turns", type=int, default=0, help="in each part; else 5, where calls take minutes fewer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure there")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table there")
    a = parser.parse_args()
    results: Figures = json.loads(a.json.read_text()) if a.json and a.json.exists() else {}
    results["machine"] = machine()

    def keep(name: str, figures: Any) -> None:
        results[name] = figures
        if a.json:
            beside = a.json.with_suffix(".part")
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(a.json)

    for kind in ("REFINER_1_0", "BASE_1_0"):
        code = f"import full_file; from sdxl_ref.config import {kind}; print(full_file.full_file({kind}))"
        folder = Path(child("-c", code)[0]["printed"]).parent
    child(
        "-c",
        "import sys, diffusers_refine as d, pathlib; d.write_folder(pathlib.Path(sys.argv[1]))",
        folder / "diffusers",
    )
    keep("bounds", {what: child(HERE / "lower_bound.py", what)[0] for what in ("operations", "rates")})
    for part in a.only or PARTS:
        for plan in PLANS.get(part, ()):
            say(plan.name)
            keep(plan.name, run_plan(plan, folder, a.turns))
        runs = run_whole(part, folder, a.turns) if part in WHOLE else run_profiles(folder) if part == PROFILES else ()
        for what, figures in runs:
            say(what)
            keep(what, figures)
    text = markdown(results)
    print(text)
    if a.out:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
