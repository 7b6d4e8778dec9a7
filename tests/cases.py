"""A sample of a test's cases in `make test`, the others in `make test-sweep`."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def sample(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """`cases` of one argument, each but `kept` marked for the sweep."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.sweep) for case in cases]


def diagonal(*axes: Sequence[Any]) -> list[Any]:
    """The product of `axes` in which `make test` meets each value, and not each pair."""
    kept = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    cases = []
    for places in product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=() if places in kept else pytest.mark.sweep))
    return cases
