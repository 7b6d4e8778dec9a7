"""A count sketch: the same in any language, linear, and near enough."""

import pytest
import torch
from pairs import seeded

from sdxl_ref.parity.sketch import SUMS, distance, hashed, sketch

MASK = (1 << 64) - 1


def by_hand(i: int) -> tuple[int, int]:
    """SplitMix64 of a flat index, in Python's whole numbers."""
    z = ((i + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return z & 1023, -1 if z >> 10 & 1 else 1


def test_the_hash_is_the_one_that_is_written_down() -> None:
    for start in (0, 123_456_789_012):
        index, sign = hashed(start, 500, torch.device("cpu"))
        expected = [by_hand(start + i) for i in range(500)]
        assert list(zip(index.tolist(), sign.int().tolist(), strict=True)) == expected


def test_what_is_kept_of_a_tensor() -> None:
    x = torch.randn(3, 5, 7, generator=seeded(0)).half()
    kept = sketch(x)
    sums = [0.0] * SUMS
    for i, value in enumerate(x.double().flatten().tolist()):
        index, sign = by_hand(i)
        sums[index] += sign * value
    assert kept.sums.tolist() == pytest.approx(sums, abs=1e-12)
    assert (kept.shape, kept.dtype) == ((3, 5, 7), "float16")
    figures = (kept.norm, kept.mean, kept.deviation, kept.low, kept.high)
    values = x.double()
    expected = (values.norm(), values.mean(), values.std(correction=0), values.min(), values.max())
    assert figures == pytest.approx([float(figure) for figure in expected])


def test_it_is_linear_and_estimates_the_distance() -> None:
    a, b = (torch.randn(100_000, generator=seeded(i)).double() for i in range(2))
    assert torch.allclose(sketch(a).sums - sketch(b).sums, sketch(a - b).sums, atol=1e-9)
    errors = []
    for i in range(40):
        gap = torch.randn(100_000, generator=seeded(10 + i)).double() * 1e-4
        errors.append(distance(sketch(a + gap), sketch(a)) / float(gap.norm()) - 1)
    assert max(map(abs, errors)) <= 0.1
    assert 0.01 <= float(torch.tensor(errors).std()) <= 0.04  # 2.2 % is expected
