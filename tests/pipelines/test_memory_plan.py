"""The plan of memory: what it says is what a run takes, and what it decides is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from cases import sample

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError
from sdxl_ref.pipelines import memory_plan
from sdxl_ref.pipelines.memory_plan import Plan, Run, fitting, plan

OFF = 0.15  # of the measured peak
GB = 10**9
CASES = [
    (kind, dtype, size, "tiled" if size > 768 else "plain")
    for kind in ("small refiner", "small base")
    for dtype in ("float32", "bfloat16", "float16")
    for size in (128, 256, 512, 768, 1024, 1536)
]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("case", sample(CASES, ("small refiner", "float32", 256, "plain")), ids=str)
def test_the_plan_is_what_a_run_takes(case: tuple[str, str, int, str]) -> None:
    check(*case, "plain")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.full
@pytest.mark.parametrize("size", [128, 512, 1024, 1536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["refiner", "base"])
def test_the_plan_at_full_size(kind: str, dtype: str, size: int) -> None:
    check(kind, dtype, size, "tiled" if size > 512 else "plain", "plain")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_of_packed_networks(dtype: str) -> None:
    check("small refiner", dtype, 512, "plain", "packed")


def check(kind: str, dtype: str, size: int, tiled: str, packed: str) -> None:
    """A run in a process of its own, from opening the model to the picture."""
    words = [kind, dtype, str(size), tiled, packed]
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}; import runpy; "
    code += f"sys.argv[1:] = {words!r}; runpy.run_path({str(Path(__file__).parent / 'planned_run.py')!r}, "
    code += "run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, measured, seconds, *_ = json.loads(done.stdout)
    print(
        f"\n{kind}, {dtype}, {size} px, {tiled}, {packed}: planned {planned / 1e6:.0f} MB in {seconds:.1f} s,", end=" "
    )
    print(f"measured {measured / 1e6:.0f} MB: {planned / measured:.2f}")
    assert abs(planned / measured - 1) <= OFF


# --- what is decided, of plans that are sums --------------------------------------------------------------------------

SMALL = Run(peers.SMALL_REFINER, 512, 512)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GB of weights in float32; 20 GB of maps at 512 px, or 8 GB where tiled."""

    def planned(run: Run) -> Plan:
        weights = 10 * GB * run.dtype.itemsize // 4
        maps = 8 * GB if run.tiled else 20 * GB * run.height * run.width // 512**2
        return Plan(run, {"unet": weights // 2, "vae": weights // 2}, {"unet": GB, "decode": maps})

    monkeypatch.setattr(memory_plan, "plan", planned)


@pytest.mark.usefixtures("sums")
def test_what_fits_stays_as_it_is() -> None:
    assert fitting(SMALL, 30 * GB) == (SMALL, "")


@pytest.mark.usefixtures("sums")
def test_where_the_system_does_not_say_every_run_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: None)
    assert fitting(SMALL) == (SMALL, "")


@pytest.mark.usefixtures("sums")
def test_what_fits_tiled_is_tiled_and_a_line_says_so() -> None:
    chosen, line = fitting(SMALL, 29 * GB)
    assert chosen == replace(SMALL, tiled=True)
    assert line == "memory: 512 x 512 px needs about 30.0 GB of memory, and 29.0 GB is free: tiled, it needs 18.0 GB"


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    ("free", "options"),
    [
        (13, "--tile and --dtype bfloat16, which needs 13.0 GB"),
        (11, "--tile and --dtype bfloat16 and --low-memory, which needs 10.5 GB"),
    ],
)
def test_what_cannot_fit_is_a_line_that_names_the_fewest_options(free: int, options: str) -> None:
    with pytest.raises(InputError) as error:
        fitting(SMALL, free * GB)
    start = f"512 x 512 px needs about 30.0 GB of memory, and {free}.0 GB is free"
    assert str(error.value) == f"{start}: use {options}, or a smaller picture"


@pytest.mark.usefixtures("sums")
def test_what_no_option_helps() -> None:
    with pytest.raises(InputError, match=r"use a smaller picture or batch.*together need 10.5 GB"):
        fitting(SMALL, GB)


def test_absurd_sizes_have_a_plan() -> None:
    assert plan(replace(SMALL, height=2**20, width=2**20)).peak > 10**6 * GB


@pytest.mark.sweep
@pytest.mark.parametrize("config", [REFINER_1_0, BASE_1_0], ids=["refiner", "base"])
def test_what_is_known_of_full_size(config: peers.ModelConfig) -> None:
    """The scores of the VAE's attention at 2048 px are 17 GB; tiled, nothing is, and the UNet's window stays one."""
    untiled = plan(Run(config, 2048, 2048))
    tiled = plan(Run(config, 2048, 2048, tiled=True))
    assert untiled.stages["decode"] > 2 * 17 * GB
    assert tiled.stages["decode"] < 8 * GB
    assert tiled.stages["unet"] == plan(Run(config, 1024, 1024, tiled=True)).stages["unet"]
    assert tiled.weights == untiled.weights
    half = plan(Run(config, 2048, 2048, tiled=True, dtype=torch.bfloat16))
    assert half.weights["unet"] == tiled.weights["unet"] // 2
    lean = replace(tiled, run=replace(tiled.run, low_memory=True))
    assert lean.peak == tiled.weights["unet"] + tiled.stages["unet"]
