"""What holds of every prompt syntax: refusals of one line, quick ends, and the rows of ids that towers read."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.chunks import Chunk
from sdxl_ref.text.inversion import Placeholders
from sdxl_ref.text.tokenizer import END, START

Read = Callable[[str, Placeholders], list[Chunk]]


def row(ids: list[int], pad: int) -> Tensor:
    """Ids of a chunk as a tower reads them: (1,77)."""
    return torch.tensor([[START, *ids, END, *[pad] * (75 - len(ids))]])


def assert_refused(parse: Callable[[], Any], message: str) -> None:
    """In one line that says this."""
    with pytest.raises(InputError) as caught:
        parse()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def assert_quick(read: Read, prompt: str) -> None:
    """A result, or one line."""
    began = time.perf_counter()
    with suppress(InputError):
        assert all(len(chunk) <= 75 for chunk in read(prompt, Placeholders()))
    assert time.perf_counter() - began < 3
