"""Kits whose run has two steps in place of five, for tests that are not about a run's length."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdxl_ref.parity import kit


@contextmanager
def short_kits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kit.REQUEST, "num_inference_steps", 4)  # of which strength 0.5 makes half
        yield
