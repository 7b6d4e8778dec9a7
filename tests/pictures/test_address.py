"""A picture at an address is fetched whole, within bounds of bytes and time."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from sdxl_ref.config import InputError
from sdxl_ref.pictures import address
from sdxl_ref.pictures.images import load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return stream.getvalue()


def answer(connection: socket.socket, stop: threading.Event) -> None:
    """One answer: what comes after the path's name decides how it misbehaves."""
    with connection:
        path = connection.recv(65536).split()[1].decode()
        data = encoded()
        head = "HTTP/1.1 200 OK\r\nConnection: close\r\n"
        if path == "/whole":
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        elif path == "/unsized":  # to the end of the connection
            connection.sendall(f"{head}\r\n".encode() + data)
        elif path == "/chunked":
            chunks = f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
        elif path == "/short":
            connection.sendall(f"{head}Content-Length: {len(data) + 7}\r\n\r\n".encode() + data)
        elif path == "/short-chunk":
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\nffff\r\n".encode() + data)
        elif path == "/silent":
            stop.wait(60)
        else:  # a byte at a time, in the head or in the body
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: " if path == "/slow-head" else f"{head}\r\n".encode())
            try:
                while not stop.wait(0.02):
                    connection.sendall(b"x")
            except OSError:
                return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection, stop), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop.set()
    listener.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.mark.parametrize("path", ["whole", "unsized", "chunked"])
def test_a_whole_answer(path: str, server: str) -> None:
    assert np.array_equal(np.asarray(load_image(f"{server}/{path}")), PIXELS)


@pytest.mark.parametrize(
    ("path", "reason"), [("short", "cut short: 7 bytes are missing"), ("short-chunk", "IncompleteRead")]
)
def test_an_answer_that_is_cut_short(path: str, reason: str, server: str) -> None:
    """Though the picture in it is whole, as far as a decoder looks."""
    with pytest.raises(InputError, match=f"could not read {server}/{path}: .*{reason}"):
        load_image(f"{server}/{path}")


@pytest.mark.parametrize("path", ["slow-head", "slow-body", "silent"])
def test_the_time_is_for_all_of_it(path: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's own timeout begins again with each byte."""
    monkeypatch.setattr(address, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"no whole answer within 0\.5 s: download it|timed out"):
        load_image(f"{server}/{path}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["whole", "unsized", "chunked"])
def test_the_bytes_are_bounded(path: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "MOST_BYTES", len(encoded()))
    assert load_image(f"{server}/{path}").size == (80, 48)
    monkeypatch.setattr(address, "MOST_BYTES", len(encoded()) - 1)
    with pytest.raises(InputError, match=r"the answer has more than .* MiB: download it, and give the file"):
        load_image(f"{server}/{path}")
