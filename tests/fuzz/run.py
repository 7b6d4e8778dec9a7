"""`make fuzz`: inputs that are almost right, to everything that reads what it did not write.

A run is right or ends with an InputError of one short printable line: no other exception, no hang, no unbounded memory.
Each target runs in a process of its own, which is given so much address space and, for each input, so much time. Of a
finding the input is kept in the folder `fuzz-findings`, as small as hypothesis can make it.

    python tests/fuzz/run.py [--seconds 600] [--seed 0] [TARGET …]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests

from hypothesis import HealthCheck, Phase, given, seed, settings

from sdxl_ref.config import InputError

FINDINGS = Path("fuzz-findings")
TIME_LIMIT = 10  # seconds for one input: a hundred times what the slowest takes, on a machine that is busy
HARD_LIMIT = 60  # and where Python itself does not get its turn
ADDRESS_SPACE = 6 << 30  # bytes beyond what the process has when it begins
GREEDY = 1 << 20  # KiB: so much more memory than ever before is too much for one small input
ROUND = 200  # inputs from one seed
LONGEST = 1500  # characters of a message: the longest that is meant has a command to paste, of 600


class TooSlow(BaseException):
    """An input that takes longer than the limit; no Exception, so that nothing catches it."""


class GreedyError(Exception):
    """An input of a few kilobytes that takes a gigabyte."""


class UncleanError(Exception):
    """An InputError that is no short printable line."""


class Fuzzing:
    """A target under its limits, and what it was found to do: by the kind and place of the error, the last input."""

    def __init__(self, name: str, target: Any, folder: Path) -> None:
        self.name = name
        self.target = target
        self.folder = folder
        self.inputs = 0
        self.refused = 0
        self.findings: dict[str, tuple[Any, str]] = {}
        self.known: set[str] = set()  # found in an earlier round

    def check(self, value: Any) -> None:
        """Run one input. Raises what a finding is, unless it is known."""
        self.inputs += 1
        place = self.folder / "input"
        place.mkdir()
        try:
            with limited():
                run_one(self.target, value, place, peak_memory() + GREEDY)
        except InputError:
            self.refused += 1
        except (Exception, TooSlow) as error:
            key = f"{type(error).__name__} in {place_of(error)}"
            self.findings[key] = (value, "".join(traceback.format_exception(error)))
            if key not in self.known:
                raise AssertionError(key) from error
        finally:
            shutil.rmtree(place)

    def round(self, number: int, most: int) -> None:
        """So many inputs from one seed, and smaller ones of what is found."""

        @seed(number)
        @settings(
            max_examples=most,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(self.target.inputs)
        def check(value: Any) -> None:
            self.check(value)

        try:
            check()
        except AssertionError:
            self.known |= self.findings.keys()


def run_one(target: Any, value: Any, folder: Path, most: int) -> None:
    """Run a target on an input; InputError where that is refused, in one line.

    UncleanError where that line is none; GreedyError where the process needs more than `most` KiB for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(value, folder)
    except InputError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > LONGEST or any(is_control(c) for c in text):
            raise UncleanError(f"{len(text)} characters: {text[:1000]!r}") from error
        raise
    finally:
        if peak_memory() > most:
            raise GreedyError(f"{peak_memory() >> 10} MiB")


def peak_memory() -> int:
    """KiB that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0"


@contextmanager
def limited() -> Iterator[None]:
    """TooSlow after the time limit; the process ends with a traceback where that cannot be raised."""

    is_over = False

    def stop(*_: Any) -> None:
        if not is_over:
            raise TooSlow(f"longer than {TIME_LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    faulthandler.dump_traceback_later(HARD_LIMIT, exit=True)
    try:
        yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def place_of(error: BaseException) -> str:
    """The innermost line of the package in a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    if isinstance(error, UncleanError):
        frames = traceback.extract_tb(error.__cause__.__traceback__)  # type: ignore[union-attr]
    own = [frame for frame in frames if f"{os.sep}sdxl_ref{os.sep}" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "the target itself"


def fuzz_target(name: str, seconds: float, number: int) -> Fuzzing:
    """Rounds of one target until its time is over, in this process."""
    from fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory() as folder:
        fuzzing = Fuzzing(name, TARGETS[name](Path(folder)), Path(folder))
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, -1))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fuzzing.round(number, ROUND)
            number += 1
    return fuzzing


def keep(fuzzing: Fuzzing) -> None:
    """Write the inputs of findings, each with its traceback."""
    for i, (key, (value, text)) in enumerate(sorted(fuzzing.findings.items())):
        folder = FINDINGS / f"{fuzzing.name}-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "traceback.txt").write_text(f"{key}\n{text}", encoding="utf-8", errors="backslashreplace")
        (folder / "input.txt").write_text(repr(value), encoding="utf-8", errors="backslashreplace")


def child(name: str, seconds: float, number: int) -> None:
    """One target, its figures as JSON on standard output."""
    fuzzing = fuzz_target(name, seconds, number)
    keep(fuzzing)
    figures = {"inputs": fuzzing.inputs, "refused": fuzzing.refused, "findings": sorted(fuzzing.findings)}
    figures |= {"peak": peak_memory() >> 10}
    print(json.dumps(figures))


def main() -> int:
    from fuzz.targets import TARGETS

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; default: all")
    p.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 600)), help="in all")
    p.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; default: the time")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    names = a.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        p.error(f"unknown target {unknown[0]}: expected {', '.join(TARGETS)}")
    if a.child:
        child(names[0], a.seconds, a.seed)
        return 0
    print(f"seed {a.seed}, {a.seconds:g} seconds for {len(names)} targets", flush=True)
    bad = 0
    total = 0
    for name in names:
        words = [
            sys.executable,
            __file__,
            name,
            "--child",
            "--seconds",
            str(a.seconds / len(names)),
            "--seed",
            str(a.seed),
        ]
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode:
            bad += 1
            print(f"{name}: the process ended with status {result.returncode}:\n{result.stderr[-4000:]}", flush=True)
            continue
        figures = json.loads(result.stdout.splitlines()[-1])
        total += figures["inputs"]
        bad += len(figures["findings"])
        shown = f"{figures['inputs']:7} inputs, {figures['refused']:7} refused, peak {figures['peak']} MB"
        print(f"{name:20} {shown}", *(f"\n    {finding}" for finding in figures["findings"]), flush=True)
    print(f"{total} inputs, {bad} findings" + (f", kept in {FINDINGS}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
