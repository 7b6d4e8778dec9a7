"""The benchmarks' own plumbing, on tiny networks: what they measure is for a quiet machine."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.sweep
def test_the_gpu_script_runs_on_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path / "gpu.md")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = (tmp_path / "gpu.md").read_text().splitlines()
    named = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    for what in (
        "UNet, bfloat16, usual layout",
        "UNet, float16, channels-last",
        "UNet, bfloat16, compiled, CUDA graphs",
    ):
        assert what in named
    assert any(name.startswith("refine, ") for name in named)
    assert any(name.startswith("ensemble, ") for name in named)
    assert not any("failed" in row for row in rows)


def test_without_a_gpu_the_script_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cuda"])
    monkeypatch.setattr("sys.path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == "gpu: expected a GPU that this PyTorch can use, found none"
