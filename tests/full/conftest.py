"""Between two tests at full size, freed memory goes back to the system: the next may need it in another process."""

import ctypes
import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """glibc keeps what is freed in small blocks: 8 GB after the networks of one file of tests."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
