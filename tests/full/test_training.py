"""A training step at full size, and what it takes."""

import math
import sys

import full_file
import measure
import pytest
import training_step

pytestmark = pytest.mark.full


def test_one_step_of_the_refiner_fits_into_24_gib() -> None:
    """Weights, gradients and AdamW's two moments in bfloat16 are 18 GB; activations are computed again."""
    measured = measure.measure([sys.executable, training_step.__file__, str(full_file.full_file())])
    log, moved = measured.output.splitlines()[-2:]
    step, loss, norm = log.split(",")[:3]
    print(f"\nloss {loss}, gradient norm {norm}, {measured.seconds:.0f} s, peak memory {measured.peak / 2**30:.1f} GiB")
    assert int(step) == 1
    assert math.isfinite(float(loss))
    assert float(norm) > 0
    assert float(moved) > 0
    assert measured.peak < 24 * 2**30
