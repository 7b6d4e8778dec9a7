"""What a hub may answer: no path as a name, and bytes in time; each in one line, with nothing outside the cache."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import hub as hubs
import pytest
from cases import sample
from hub import Hub

from sdxl_ref.config import InputError
from sdxl_ref.weights.hub_limits import check_fields, check_name, in_time

OUTSIDE = "../../../../outside"
DOWNLOAD = """
import time
from sdxl_ref.cli import run
from sdxl_ref.weights import hub, hub_limits

hub_limits.SILENCE, hub_limits.WINDOW = 0.3, 0.3
time.sleep = lambda seconds: None  # between huggingface_hub's tries
raise SystemExit(run("tool", lambda: print(hub.download("owner/model", None)) or 0))
"""


def download(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    repository = folder / "repository"
    repository.mkdir()
    (repository / "model.safetensors").write_bytes(bytes(50_000))
    hub.repositories["owner/model"] = repository
    cache = folder / "a" / "b" / "c" / "cache"
    cache.mkdir(parents=True)
    return hubs.run(DOWNLOAD, hub, cache)


WRONG = {
    "etag": (OUTSIDE, "the hub answered with the ETag"),
    "commit_id": (OUTSIDE, "the hub answered with the sha"),
    "drips": (True, "the hub sent "),
    "is_silent": (True, "owner/model is neither in the cache nor to be had from the hub: "),
}


@pytest.mark.parametrize("fault", sample(WRONG, "etag"))
def test_a_hub_that_does_wrong(fault: str, hub: Hub, tmp_path: Path) -> None:
    value, message = WRONG[fault]
    setattr(hub, fault, value)
    done = download(hub, tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # above are huggingface_hub's bar and its log
    assert last.startswith("tool: error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("outside*"))


def test_bytes_that_come_in_time_and_bytes_that_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(step=10.0)
    monkeypatch.setattr("time.monotonic", lambda: next(now))  # ten seconds for each block
    enough = [bytes(10 << 10)] * 100
    assert list(in_time(lambda: iter(enough))()) == enough
    with pytest.raises(InputError, match="the hub sent 70 bytes in 60 seconds: try again later"):
        list(in_time(lambda: iter([bytes(10)] * 100))())


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "../x", "/etc/x", 'W/"../x"', "a\0b"])
def test_a_name_that_is_a_path(name: str) -> None:
    with pytest.raises(InputError, match="which is no name of a file"):
        check_name("ETag", name)
    with pytest.raises(InputError, match="the oid"):
        check_fields([{"lfs": {"oid": name}}])


@pytest.mark.parametrize("name", ["", None, "0" * 40, 'W/"5d8c72-36a"', '"d41d8cd9-3"', "a..b"])
def test_a_name(name: str | None) -> None:
    check_name("ETag", name)
    check_fields({"sha": name, "siblings": [{"rfilename": "unet/config.json"}]})
