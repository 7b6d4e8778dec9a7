"""A pipe keeps its reader waiting for ever: it is told where data, captions, configurations and adapters are read."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
from training_runs import command, save_model, save_pictures

from sdxl_ref.adapters import lora
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.training.state import LOG, STATE
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.regular import check_regular, read_text
from weights_convert.convert import convert

PIPE = "is a pipe or a device: expected a regular file"


@pytest.fixture(autouse=True)
def within_a_minute() -> Iterator[None]:
    """What hangs fails."""
    assert threading.current_thread() is threading.main_thread()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe"])
def test_pipes_and_devices_are_told(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=f"{name} {PIPE}"):
        check_regular(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} {PIPE}"):
        read_text(tmp_path / name)


def test_files_links_folders_and_what_is_not_there_are_left_to_who_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", ".", "none"):
        check_regular(tmp_path / name)
    assert read_text(tmp_path / "link") == "text"
    for name in ("none", "."):
        with pytest.raises(InputError, match="could not read"):
            read_text(tmp_path / name)


def test_an_adapter(tmp_path: Path, small_refiner_file: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is a named pipe: expected a safetensors file"):
        lora.load(tmp_path / "a.safetensors", peers.SMALL_REFINER)


@pytest.mark.parametrize("name", ["unet/config.json", "vae/config.json", "text_encoder_2/config.json"])
def test_a_configuration(name: str, small_refiner_file: Path, tmp_path: Path) -> None:
    convert(small_refiner_file, tmp_path / "folder", "diffusers")
    (tmp_path / "folder" / name).unlink()
    os.mkfifo(tmp_path / "folder" / name)
    with pytest.raises(InputError, match=PIPE):
        open_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize(
    "name", [f"out/{STATE}", f"out/{LOG}", "out/.lock", "data/metadata.jsonl", "data/0.png", "data/0.txt"]
)
def test_what_training_reads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_pictures(tmp_path / "data")
    if name.endswith(".txt"):
        (data / "metadata.jsonl").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    words = command(save_model(tmp_path / "model.safetensors"), data, tmp_path / "out", "--steps", "1")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert Path(name).name in error
    assert "Traceback" not in error
    if not name.endswith(".png"):
        assert PIPE in error


def test_a_pipe_in_the_cache_is_no_shard(tmp_path: Path) -> None:
    data = save_pictures(tmp_path / "data")
    words = command(save_model(tmp_path / "model.safetensors"), data, tmp_path / "out", "--steps", "1")
    (tmp_path / "out" / "cache").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / "cache" / f"latents-{16 * '0'}.safetensors")
    assert main(words) == 0
    shutil.rmtree(tmp_path / "out")
