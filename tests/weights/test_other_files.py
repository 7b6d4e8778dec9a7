"""What is no safetensors file is told as what it is, by every reader of such files, and nothing but files is read."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import REFINER
from PIL import Image
from safetensors.torch import load_file

from sdxl_ref.adapters import lora
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from sdxl_ref.weights.report import describe
from sdxl_ref.weights.tensor_files import read_headers
from weights_convert.convert import convert
from weights_convert.parts import separate_part

READERS: dict[str, Callable[[Path], object]] = {
    "a checkpoint": open_checkpoint,
    "an adapter": lambda path: lora.load(path, REFINER),
    "a file of a part": lambda path: separate_part(path, "vae", REFINER),
    "another part": lambda path: separate_part(path, "text_encoder_2", REFINER),
    "a VAE beside a checkpoint": lambda path: open_checkpoint("pocket-refiner", vae=path),
    "info": describe,
}
readers = pytest.mark.parametrize("reader", READERS)
HTML = b'\n<!DOCTYPE html>\n<html lang="en"><head><title>404: model not found</title></head></html>'
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f\nsize 6075981930\n"
)


def old_pickle(path: Path) -> None:
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model.safetensors", b"")


FILES: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "a page": (HTML, "is a page of HTML, as a server sends instead of a model"),
    "a page with a mark": (b"\xef\xbb\xbf<html></html>", "is a page of HTML"),
    "an XML answer": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML text"),
    "an answer in JSON": (json.dumps({"error": "Access to this model is restricted"}).encode(), "is a JSON text"),
    "a pointer": (POINTER, "is a pointer of git-lfs, not the file of 6075981930 bytes that it stands for: run"),
    "a new pickle": (lambda path: torch.save({"state_dict": {}}, path), "is a pickle, which can run any code"),
    "an old pickle": (old_pickle, "is a pickle, which can run any code"),
    "a bare pickle": (pickle.dumps({"a": 1}), "is a pickle, which can run any code"),
    "a zip archive": (archive, "is a zip archive: expected the safetensors file in it"),
    "a gzip archive": (gzip.compress(b"x"), "is a gzip archive"),
    "quantised weights": (b"GGUF\x03\0\0\0" + b"\0" * 64, "is a GGUF file, of quantised weights"),
    "a picture": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "is a PNG picture"),
    "a photo": (lambda path: Image.new("RGB", (8, 8)).save(path, "JPEG"), "is a JPEG picture"),
    "nothing": (b"", "it is empty: download it again"),
}


def line_of(reader: str, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        READERS[reader](path)
    line = str(caught.value)
    assert "\n" not in line
    return line


@readers
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_model(name: str, reader: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    line = line_of(reader, path)
    assert message in line
    assert str(path) in line


@readers
@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".PT"])
def test_a_pickle_by_its_name_has_one_text(suffix: str, reader: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"whatever")
    assert line_of(reader, path).startswith(f"{path} is a pickle, which can run any code when opened: expected a safe")


def test_the_advice_for_a_pickle_works(tmp_path: Path) -> None:
    """As it is printed, on one with a state inside, on a bare one, and on tensors that share their memory."""
    whole = torch.arange(6.0)
    for state in ({"state_dict": {"a": whole[:3], "b": whole}, "epoch": 3}, {"a": whole[:3], "b": whole}):
        path = tmp_path / "a.bin"
        torch.save(state, path)
        advice = line_of("a checkpoint", path).split("convert it: ")[1]
        names = {"torch": torch, "safetensors": safetensors, "FILE": path, "OUT": tmp_path / "b.safetensors"}
        exec(advice, names)
        assert load_file(tmp_path / "b.safetensors")["b"].tolist() == whole.tolist()


def test_a_download_that_was_cut_off_says_how_much_is_missing(tmp_path: Path) -> None:
    data = POCKET["pocket-refiner"].read_bytes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(data[:-1000])
    assert line_of("a checkpoint", path).endswith(f"it has {len(data) - 1000} of {len(data)} bytes: download it again")


def test_a_pointer_in_a_folder_is_told_as_one(tmp_path: Path) -> None:
    """As `git clone` leaves a model without git-lfs."""
    convert(POCKET["pocket-refiner"], tmp_path / "model", "diffusers")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(POINTER)
    line = line_of("a checkpoint", tmp_path / "model")
    assert f"{weights} is a pointer of git-lfs" in line


# --- nothing but files --------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe into which nobody writes: opening it for reading would wait for ever."""
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    return path


@readers
def test_a_pipe_is_not_read(reader: str, pipe: Path) -> None:
    assert line_of(reader, pipe) == f"{pipe} is a named pipe: expected a safetensors file"


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pipe_in_a_folder_is_not_read(part: str, name: str, tmp_path: Path) -> None:
    convert(POCKET["pocket-refiner"], tmp_path / "model", "diffusers")
    path = tmp_path / "model" / part / name
    path.unlink()
    os.mkfifo(path)
    line = line_of("a checkpoint", tmp_path / "model")
    assert "\n" not in line


def test_the_extras_of_a_folder_are_no_pipe(tmp_path: Path) -> None:
    convert(POCKET["pocket-refiner"], tmp_path / "model", "diffusers")
    path = tmp_path / "model" / "official_extras.safetensors"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert "is a named pipe" in line_of("a checkpoint", tmp_path / "model")


def test_a_socket_and_a_device_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a")
        assert line_of("a checkpoint", Path("a")) == "a is a socket: expected a safetensors file"
    assert line_of("an adapter", Path("/dev/zero")) == "/dev/zero is a device: expected a safetensors file"
    with pytest.raises(InputError, match="is a pipe or a device"):
        read_json(Path("/dev/zero"))


def test_a_folder_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} is a folder: expected a safetensors file"):
        read_headers(tmp_path)


def test_a_pipe_is_told_on_the_command_line(pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(pipe)]) == 2
    assert capsys.readouterr().err == f"sdxl-ref: error: {pipe} is a named pipe: expected a safetensors file\n"


def test_only_what_is_wrong_is_looked_into() -> None:
    """A whole file loads nothing of this module."""
    code = "import sys; from sdxl_ref.weights.opening import *; open_checkpoint('pocket-refiner'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in modules if name.startswith("sdxl_ref.weights.")}
    unusual = {"other_files", "unusual", "strangers", "folder", "names", "separate_vae", "identify", "fitting"}
    assert {f"sdxl_ref.weights.{name}" for name in ("opening", "checkpoint", "tensor_files")} <= own
    assert own & {f"sdxl_ref.weights.{name}" for name in unusual} == set()


def test_what_safetensors_quotes_of_a_header_is_cut(tmp_path: Path) -> None:
    """Found by `make fuzz`."""
    header = json.dumps("x" * 5000).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"invalid type: string .xxx") as caught:
        read_headers(path)
    assert len(str(caught.value)) < 400 + len(str(path))
