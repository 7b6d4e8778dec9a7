"""A few inputs for each target of `make fuzz`: that the targets run, and that what they would find is found."""

from pathlib import Path
from typing import Any

import pytest
from fuzz.run import Fuzzing
from fuzz.targets import TARGETS
from hypothesis import strategies as st

from sdxl_ref.config import InputError

QUICK = [name for name in TARGETS if name not in ("indices", "folder-configs", "checkpoints")]  # a second each


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in TARGETS]
)
def test_a_few_inputs(name: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    fuzzing = Fuzzing(name, TARGETS[name](tmp_path / "target"), tmp_path)
    fuzzing.round(0, 20)
    assert fuzzing.inputs >= 20
    assert list(fuzzing.findings) == []


class Faulty:
    """A target with a fault beyond a thousand."""

    def __init__(self, fault: Any) -> None:
        self.inputs = st.integers(0, 2000)
        self.fault = fault

    def run(self, value: int, folder: Path) -> None:
        if value > 1000:
            self.fault()


def crash() -> None:
    raise KeyError("a")


def refuse_badly() -> None:
    raise TwoLinesError


class TwoLinesError(InputError):
    def __str__(self) -> str:
        return "two\nlines"


def hang() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(crash, "KeyError"), (refuse_badly, "UncleanError"), (hang, "TooSlow")],
    ids=["crash", "lines", "hang"],
)
def test_a_fault_is_found_once_with_the_smallest_input(
    fault: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.run.TIME_LIMIT", 0.05 if fault is hang else 10)
    fuzzing = Fuzzing("faulty", Faulty(fault), tmp_path)
    fuzzing.round(0, 50)
    [(key, (value, text))] = fuzzing.findings.items()
    assert key.startswith(f"{kind} in ")
    assert value == 1001 or (fault is hang and value > 1000)
    assert kind in text
    fuzzing.round(1, 50)  # which goes on past what is known
    assert len(fuzzing.findings) == 1
