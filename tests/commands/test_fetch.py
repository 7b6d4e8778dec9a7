"""`sdxl-ref fetch`: an official file from the hub, and its hash."""

from pathlib import Path

import hub as hubs
import pytest
from command_line import assert_one_line
from hub import Hub

from sdxl_ref.cli import main

REPOSITORY = "stabilityai/stable-diffusion-xl-refiner-1.0"
NAME = "sd_xl_refiner_1.0.safetensors"
TWICE = """
import hashlib
from pathlib import Path
from sdxl_ref.cli import main
from sdxl_ref.weights import checkpoint

statuses = [main(["fetch", "refiner"])]
digest = hashlib.sha256(Path({file!r}).read_bytes()).hexdigest()
checkpoint.KNOWN_FILES.clear()  # the small file stands in for the official one, whose hash it takes over
checkpoint.KNOWN_FILES[digest] = ("sd_xl_refiner_1.0", "1.0")
statuses.append(main(["fetch", "refiner", "--out", "models"]))
print(statuses)
"""


def test_a_file_keeps_its_name_only_where_its_hash_is_the_official_one(
    hub: Hub, tmp_path: Path, tiny_refiner_file: Path
) -> None:
    hub.repositories[REPOSITORY] = repository = tmp_path / "repository"
    repository.mkdir()
    (repository / NAME).write_bytes(tiny_refiner_file.read_bytes())
    (tmp_path / "models").mkdir()
    done = hubs.run(TWICE.format(file=str(tiny_refiner_file)), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    told, statuses = done.stdout.splitlines()
    assert statuses == "[2, 0]"
    assert told.endswith(f"models/{NAME}: sha256 is the official one")
    refused = Path(NAME).with_suffix(".refused")
    assert f"{refused} is not the official file: expected sha256 7440042b" in done.stderr
    assert (tmp_path / refused).exists()
    assert not (tmp_path / NAME).exists()
    assert (tmp_path / "models" / NAME).read_bytes() == tiny_refiner_file.read_bytes()


def test_the_folder_has_to_be_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "refiner", "--out", "none"]) == 2
    assert_one_line(capsys.readouterr().err, "expected an existing folder, found none")
