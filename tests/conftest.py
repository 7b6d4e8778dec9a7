"""Shared fixtures, and a count that the refiner's parity tests really ran."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pairs
import peers
import pytest
import torch
from hub import Hub

from sdxl_ref.config import ModelConfig
from sdxl_ref.weights.checkpoint_saving import save_checkpoint

PARITY_FLOOR = 150  # parity tests that a whole run has to pass; an empty or skipped folder must not look green
USUAL = "not full and not sweep"  # the marks of `make test`, in pyproject.toml
_passed: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--packed", action="store_true", help="the parity tests with our networks packed")


def pytest_configure(config: pytest.Config) -> None:
    pairs.PACKED = config.getoption("--packed")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or no process of a test could be interrupted


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: to look through them for garbage again and again takes a tenth of a run."""
    gc.collect()
    gc.freeze()


def write_model(folders: pytest.TempPathFactory, name: str, config: ModelConfig) -> Path:
    """A model of seeded weights as one file in the official layout, float16."""
    path = folders.mktemp("checkpoints") / f"{name}.safetensors"
    save_checkpoint(path, config, peers.networks(config), torch.float16)
    return path


@pytest.fixture(scope="session")
def small_refiner_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory, "small_refiner", peers.SMALL_REFINER)


@pytest.fixture(scope="session")
def small_base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory, "small_base", peers.SMALL_BASE)


@pytest.fixture(scope="session")
def tiny_refiner_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory, "tiny_refiner", peers.TINY_REFINER)


@pytest.fixture(scope="session")
def tiny_base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory, "tiny_base", peers.TINY_BASE)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    opened = Hub()
    yield opened
    opened.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and report.nodeid.startswith("tests/parity/"):
        _passed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A whole run (`pytest` without arguments) fails where fewer parity tests passed than there have to be."""
    if hasattr(session.config, "workerinput"):  # the process that leads the others counts
        return
    option = session.config.option
    selects = option.keyword or option.markexpr != USUAL or option.collectonly
    whole = session.config.args == session.config.getini("testpaths") and not selects
    if whole and exitstatus == 0 and len(_passed) < PARITY_FLOOR:
        print(f"\nonly {len(_passed)} parity tests passed, at least {PARITY_FLOOR} have to")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
