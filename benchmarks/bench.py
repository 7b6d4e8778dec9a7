"""Time and memory of this package beside diffusers', in one run, on a generated refiner of full size: `make bench`.

Every figure comes from fresh processes, and the two sides take turns. A ratio is ours over diffusers', so less is
better. The file is generated once (tests/full/full_file.py); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "full")]

from measure import Measured, measure  # noqa: E402

PHOTO = HERE.parent / "sdxl_ref" / "data" / "photo.jpg"
FLOAT32_WEIGHTS = 4 * (2_259_526_660 + 694_659_841 + 83_653_863)  # bytes: UNet, bigG, VAE
IMPORTS = {
    "ours": "import sdxl_ref; from sdxl_ref import ImageToImagePipeline",
    "diffusers": "from diffusers import StableDiffusionXLImg2ImgPipeline",
}
SIDES = ("ours", "diffusers")
PACKAGES = ("sdxl-ref", "torch", "diffusers", "transformers", "safetensors", "accelerate")


class Row(NamedTuple):
    """One line of the table; `limit` bounds `ratio`, or `copies` where that is given."""

    what: str
    ours: str
    diffusers: str
    ratio: float
    limit: float | None = None
    copies: float | None = None

    def cells(self) -> tuple[str, ...]:
        if self.limit is None:
            return self.what, self.ours, self.diffusers, f"{self.ratio:.2f}", "", ""
        found = self.ratio if self.copies is None else self.copies
        target = f"{self.limit} or less" + ("" if self.copies is None else f" copies (it is {self.copies:.3f})")
        met = "yes" if found <= self.limit else "NO"
        return self.what, self.ours, self.diffusers, f"{self.ratio:.2f}", target, met


class Setting(NamedTuple):
    file: Path
    folder: Path  # diffusers' configuration, and room for pictures
    repeats: int
    device: str


def by_turns(run: Callable[[str], Measured], repeats: int) -> dict[str, list[Measured]]:
    """Both sides, `repeats` times each; who begins changes from turn to turn."""
    results: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for turn in range(repeats):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            results[side].append(measured := run(side))
            say(f"  {side:<9} {measured.seconds:7.2f} s, peak {gb(measured.peak)}")
    return results


def child(*command: object) -> Measured:
    """A Python process that finds the tests' helpers and asks no network."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "full"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return measure([sys.executable, *map(str, command)], HF_HUB_OFFLINE="1", PYTHONPATH=path)


def compare(what: str, times: dict[str, list[float]], limit: float | None) -> Row:
    """Medians of both, and the median of the turns' ratios: what slows a whole turn down falls out of it."""
    ours, theirs = (statistics.median(times[side]) for side in SIDES)
    ratio = statistics.median(a / b for a, b in zip(*(times[side] for side in SIDES), strict=True))
    return Row(what, f"{ours:.2f} s", f"{theirs:.2f} s", ratio, limit)


def compare_memory(what: str, peaks: dict[str, list[int]], limit: float | None, copies: bool = False) -> Row:
    ours, theirs = (statistics.median(peaks[side]) for side in SIDES)
    return Row(what, gb(ours), gb(theirs), ours / theirs, limit, ours / FLOAT32_WEIGHTS if copies else None)


def bench_unet(s: Setting) -> Iterator[Row]:
    """In one process for both, so that they share the weights."""
    warm(s.file)
    if s.device == "cpu":
        cases = [("float32", 512, 1, False), ("bfloat16", 512, 1, False)]
    else:
        cases = [("bfloat16", 1024, 2, False), ("bfloat16", 1024, 2, True)]
    for dtype, pixels, batch, compiled in cases:
        kind = ", compiled" if compiled else ", eager" if s.device != "cpu" else ""
        what = f"UNet forward, {pixels} px, batch {batch}, {dtype}{kind}"
        say(what)
        options = ["--dtype", dtype, "--pixels", pixels, "--batch", batch, "--device", s.device]
        options += ["--repeats", max(8, s.repeats) if s.device == "cpu" else 20, *["--compile"] * compiled]
        found = json.loads(child(HERE / "unet_forward.py", s.file, *options).output.splitlines()[-1])
        say(f"  {found['where']}; distance of the outputs {found['distance']:.1e}")
        say("  " + "; ".join(f"{side} " + " ".join(f"{t:.3f}" for t in found[side]) for side in SIDES))
        yield compare(f"{what} ({found['where']})", found, 1.0)


def bench_import(s: Setting) -> Iterator[Row]:
    say("import")
    program = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
    for side in SIDES:  # once unseen, for the page cache
        child("-c", program.format(IMPORTS[side]))
    runs = by_turns(lambda side: child("-c", program.format(IMPORTS[side])), max(5, s.repeats))
    yield compare("import of the pipeline", printed(runs), 0.5)


def bench_open(s: Setting) -> Iterator[Row]:
    for dtype, limit in (("float16", 1.0), ("float32", 0.5)):
        say(f"open as {dtype}")

        def run(side: str, dtype: str = dtype) -> Measured:
            warm(s.file)
            return child(HERE / "opening.py", side, s.file, s.folder, dtype)

        runs = by_turns(run, max(4, s.repeats))
        yield compare(f"open the float16 file as {dtype}", printed(runs), limit)
        if dtype == "float32":
            yield floor(statistics.median(printed(runs)["diffusers"]), max(4, s.repeats))
        peaks = {side: [m.peak_anonymous for m in runs[side]] for side in SIDES}
        bound = 1.1 if dtype == "float32" else None
        yield compare_memory(f"open as {dtype}: peak RssAnon", peaks, bound, copies=dtype == "float32")


def floor(diffusers: float, repeats: int) -> Row:
    """The system's price of so much new memory: what no way of opening as float32 can go under."""
    program = "import time, torch; began = time.perf_counter(); torch.empty({}).fill_(1); "
    program += "print(time.perf_counter() - began)"
    runs = [child("-c", program.format(FLOAT32_WEIGHTS // 4)) for _ in range(repeats)]
    ours = statistics.median(float(m.output) for m in runs)
    say("  first touch " + " ".join(m.output.strip() for m in runs))
    return Row("of which: writing to so much new memory, once", f"{ours:.2f} s", "", ours / diffusers)


def bench_cold(s: Setting) -> Iterator[Row]:
    """Process start to PNG; each side's own defaults for all that is not named."""
    out = s.folder / "out.png"
    options = [PHOTO, "--checkpoint", s.file, "--out", out, "--prompt", "a cup of coffee on a wooden table"]
    options += ["--steps", 10, "--strength", 0.3, "--guidance-scale", 5, "--seed", 0]
    programs = {
        "ours": [Path(sys.executable).with_name("sdxl-ref"), "refine"],
        "diffusers": [TESTS / "full" / "diffusers_refine.py", "--folder", s.folder],
    }
    for dtype in ("bfloat16", "float32"):
        what = f"cold run to PNG, 512 px, 3 steps, {dtype}"
        say(what)

        def run(side: str, dtype: str = dtype) -> Measured:
            warm(s.file)
            out.unlink(missing_ok=True)
            measured = child(*programs[side], *options, "--dtype", dtype)
            assert out.stat().st_size > 0
            return measured

        runs = by_turns(run, max(2, s.repeats))
        yield compare(what, {side: [m.seconds for m in runs[side]] for side in SIDES}, 0.9)
        yield compare_memory(f"{what}: peak RSS", {side: [m.peak for m in runs[side]] for side in SIDES}, 0.9)


PARTS = {"unet": bench_unet, "import": bench_import, "open": bench_open, "cold": bench_cold}


def printed(runs: dict[str, list[Measured]]) -> dict[str, list[float]]:
    """The seconds that the children timed themselves: their last line."""
    return {side: [float(m.output.splitlines()[-1]) for m in runs[side]] for side in SIDES}


def warm(file: Path) -> None:
    """Read the file once, so that it lies in the page cache for whoever is next."""
    with file.open("rb") as f:
        while f.read(1 << 24):
            pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def machine() -> str:
    """What the figures were taken on, without names or paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"


def versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])


def has_gpu() -> bool:
    code = "import torch; print(torch.cuda.is_available())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"


def markdown(rows: list[Row], device: str, gpu: bool) -> str:
    head = ("", "ours", "diffusers", "ratio", "target", "met")
    table = [head, ("---",) * len(head), *(row.cells() for row in rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    notes = [f"Machine: {machine()}.", f"Versions: {versions()}."]
    notes.append("Medians over turns, of ratios too: ours over diffusers'. The file lies in the page cache.")
    if device == "cpu" and not gpu:
        notes.append(
            "There is no GPU table: no GPU was to be had. `python benchmarks/bench.py --device cuda` makes it."
        )
    return "\n".join(["# Ours and diffusers side by side", "", *lines, "", *(f"- {note}" for note in notes), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the UNet alone")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part, or several; else all")
    parser.add_argument("--repeats", type=int, default=0, help="at least so many turns in each part")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table there")
    a = parser.parse_args()
    gpu = has_gpu()
    if a.device == "cuda" and not gpu:
        say("bench: --device cuda needs a GPU that torch can use, found none")
        return 2
    parts = ["unet"] if a.device == "cuda" else a.only or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(child(TESTS / "full" / "full_file.py").output.splitlines()[-1])
        child("-c", "import sys, diffusers_refine as d, pathlib; d.write_folder(pathlib.Path(sys.argv[1]))", folder)
        setting = Setting(file, Path(folder), a.repeats, a.device)
        rows = [row for part in parts for row in PARTS[part](setting)]
    text = markdown(rows, a.device, gpu)
    print(text)
    if a.out:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
