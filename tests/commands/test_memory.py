"""Memory that cannot be had is told in one line; other errors stay what they are."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import assert_one_line, process

from sdxl_ref.cli import run
from sdxl_ref.commands.memory import tell

HUGE = ["--height", "16384", "--width", "16384", "--steps", "20"]


def of_cuda() -> None:
    """As PyTorch 2.5 says it (there need not be a GPU here)."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.2 GiB is "
        "free. Process 1 has 6 GiB memory in use.\nSee documentation for Memory Management"
    )


def of_windows() -> None:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "68719476736 bytes."
    )


def of_macs() -> None:
    raise RuntimeError("MPS backend out of memory (MPS allocated: 17.93 GB, max allowed: 18.13 GB). Tried to allocate…")


def of_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: torch.empty(10**15, dtype=torch.uint8), "memory is not enough (1000000.0 GB at once): close other"),
        (lambda: torch.empty(2**40, 2**40), "memory is not enough"),
        (lambda: np.zeros(10**15, np.uint8), "memory is not enough"),
        (lambda: bytearray(10**15), "memory is not enough"),
        (of_cuda, "the GPU's memory is not enough (20.00 GiB at once): close other programs, or ask for less: --dtype"),
        (of_windows, "memory is not enough (68.7 GB at once)"),
        (of_macs, "the GPU's memory is not enough"),
        (of_cublas, "the GPU's memory is not enough"),
    ],
    ids=["torch", "a size past all", "numpy", "python", "cuda", "windows", "macs", "cublas"],
)
def test_one_line_of_advice(work: Callable[[], object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        work()
        return 0

    assert run("sdxl-ref", fail) == 1
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), RecursionError(), NotImplementedError()]
)
def test_other_errors_stay(error: RuntimeError) -> None:
    with pytest.raises(type(error)) as raised:
        tell("sdxl-ref", error)
    assert raised.value is error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's addresses so")
def test_a_picture_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    """Where the system does not say what is free, no plan is made, and the run finds out itself."""
    limit = 5 << 30
    words = ["generate", "--base", "pocket", "--prompt", "x", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    words += HUGE
    code = "import sys; from sdxl_ref.commands import room; room.free_memory = lambda device: None\n"
    code += f"from sdxl_ref.cli import main; sys.exit(main({words!r}))"
    command = [sys.executable, "-c", code]
    limited = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1
    assert_one_line(done.stderr, "memory is not enough (")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_fit_is_told_before_the_work(tmp_path: Path) -> None:
    out = str(tmp_path / "x.png")
    done = process(["generate", "--base", "pocket", "--prompt", "x", "--device", "cpu", "--out", out, *HUGE])
    assert done.returncode == 2
    assert_one_line(done.stderr, "16384 x 16384 px needs about ")
    assert not list(tmp_path.iterdir())
