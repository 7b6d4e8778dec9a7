"""Shared fixtures, and a count that the refiner's parity tests really ran."""

from pathlib import Path

import peers
import pytest
import torch

from sdxl_ref.saving import save_checkpoint

PARITY_FLOOR = 60  # parity tests that a whole run has to pass; an empty or skipped folder must not look green
_passed: set[str] = set()


@pytest.fixture(scope="session")
def small_refiner_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small refiner of seeded weights as one file in the official layout, float16."""
    path = tmp_path_factory.mktemp("checkpoints") / "small_refiner.safetensors"
    parts = {"unet": peers.small_unet(), "vae": peers.small_vae(), "text_encoder_2": peers.small_openclip()}
    save_checkpoint(path, peers.SMALL_REFINER, parts, torch.float16)
    return path


@pytest.fixture(scope="session")
def small_base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base of seeded weights as one file in the official layout, float16."""
    path = tmp_path_factory.mktemp("checkpoints") / "small_base.safetensors"
    parts = {"unet": peers.small_unet(peers.SMALL_BASE.unet), "vae": peers.small_vae()}
    parts |= {"text_encoder": peers.small_clip(), "text_encoder_2": peers.small_openclip()}
    save_checkpoint(path, peers.SMALL_BASE, parts, torch.float16)
    return path


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and report.nodeid.startswith("tests/parity/"):
        _passed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A whole run (`pytest` without arguments) fails where fewer parity tests passed than there have to be."""
    if hasattr(session.config, "workerinput"):  # the process that leads the others counts
        return
    whole = session.config.args == session.config.getini("testpaths") and not session.config.option.keyword
    if whole and not session.config.option.collectonly and exitstatus == 0 and len(_passed) < PARITY_FLOOR:
        print(f"\nonly {len(_passed)} parity tests passed, at least {PARITY_FLOOR} have to")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
