"""Pictures of every kind in, as upright 8-bit RGB; what is no picture is one error.

Decoders are Pillow's own to check: a case or two of each kind shows what is made of what they return, or raise.
"""

from __future__ import annotations

import io
import os
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import load_image, to_rgb

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)  # (h,w,3)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
GREY_16 = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
ALPHA = RNG.integers(0, 256, (12, 20), dtype=np.uint8)


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return values * share + 255.0 * (1 - share)


def assert_rgb(image: Image.Image, expected: np.ndarray, levels: float = 0) -> None:
    assert image.mode == "RGB"
    found = np.asarray(image).astype(float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= levels


def repeated(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def through_file(image: Image.Image, path: Path, **options: Any) -> Image.Image:
    image.save(path, **options)
    return load_image(path)


# --- modes --------------------------------------------------------------------------------------------------------


def test_rgb_is_taken_as_it_is(tmp_path: Path) -> None:
    assert_rgb(through_file(Image.fromarray(PIXELS), tmp_path / "a.png"), PIXELS)
    assert_rgb(through_file(Image.fromarray(PIXELS), tmp_path / "a.webp", lossless=True), PIXELS)


def test_grey(tmp_path: Path) -> None:
    assert_rgb(through_file(Image.fromarray(GREY), tmp_path / "a.png"), repeated(GREY))


def test_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 127
    assert_rgb(through_file(Image.fromarray(bits), tmp_path / "a.png"), repeated(bits * 255))


def test_rgba_goes_over_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([PIXELS, ALPHA]))
    assert_rgb(through_file(image, tmp_path / "a.png"), over_white(PIXELS, ALPHA), 1)


def test_grey_with_alpha_goes_over_white(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert_rgb(through_file(image, tmp_path / "a.png"), over_white(repeated(GREY), ALPHA), 1)


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """The picture, the colour of each pixel, and its index."""
    index = RNG.integers(0, 5, (12, 20), dtype=np.uint8)
    colours = RNG.integers(0, 256, (5, 3), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    return image, colours[index], index


def test_palette_with_and_without_a_transparent_colour(tmp_path: Path) -> None:
    image, colours, index = palette_image()
    assert_rgb(through_file(image, tmp_path / "a.png"), colours)
    expected = np.where(index[..., None] == 3, 255, colours)
    assert_rgb(through_file(image, tmp_path / "b.png", transparency=3), expected)


def test_rgb_with_one_transparent_colour(tmp_path: Path) -> None:
    pixels = PIXELS.copy()
    pixels[3:6, 4:9] = (10, 20, 30)
    expected = np.where((pixels == (10, 20, 30)).all(axis=2, keepdims=True), 255, pixels)
    assert_rgb(through_file(Image.fromarray(pixels), tmp_path / "a.png", transparency=(10, 20, 30)), expected)


def test_16_bit_grey(tmp_path: Path) -> None:
    """Divided by 257, so that 65535 is 255; not clipped, not shifted."""
    expected = repeated(np.round(GREY_16 / 257.0))
    assert_rgb(through_file(Image.fromarray(GREY_16), tmp_path / "a.png"), expected)


def test_16_bit_grey_of_either_byte_order_and_in_32_bits() -> None:
    expected = repeated(np.round(GREY_16 / 257.0))
    for data, mode in ((GREY_16.astype("<u2"), "I;16"), (GREY_16.astype(">u2"), "I;16B"), (GREY_16.astype("<i4"), "I")):
        image = Image.frombytes(mode, (20, 12), data.tobytes())
        assert image.mode == mode
        assert_rgb(to_rgb(image), expected)


def png_16(values: np.ndarray) -> bytes:
    """A PNG of RGBA with 16 bits a channel, which Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_rgba(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (12, 20, 4))
    (tmp_path / "a.png").write_bytes(png_16(values))
    scaled = values / 257.0
    expected = over_white(scaled[..., :3], scaled[..., 3])
    assert_rgb(load_image(tmp_path / "a.png"), expected, 2)  # Pillow itself keeps the upper 8 of the 16 bits


def test_cmyk(tmp_path: Path) -> None:
    ink = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
    loaded = through_file(Image.frombytes("CMYK", (20, 12), ink.tobytes()), tmp_path / "a.tiff")
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255.0
    assert_rgb(loaded, expected, 1)


def test_floating_point_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((12, 20), dtype=np.float32))
    image.save(tmp_path / "a.tiff")
    for source in (image, tmp_path / "a.tiff"):
        with pytest.raises(InputError, match="found floating point"):
            load_image(source)


@pytest.mark.filterwarnings("ignore:.* holds several pictures")  # told: see test_frames.py
def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_rgb(load_image(tmp_path / "a.gif"), np.full((16, 16, 3), (255, 0, 0)))


# --- orientation --------------------------------------------------------------------------------------------------


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(1, PIXELS), (2, PIXELS[:, ::-1]), (6, np.rot90(PIXELS, 1)), (77, PIXELS)],
    ids=["upright", "mirrored", "turned", "unknown"],
)
def test_pictures_are_made_upright_once(orientation: int, stored: np.ndarray, tmp_path: Path) -> None:
    """By their EXIF orientation, whatever they come as."""
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=turned(orientation))
    upright = load_image(path)
    assert_rgb(upright, PIXELS)
    assert_rgb(load_image(upright), PIXELS)  # turned once, not twice
    with Image.open(path) as opened:
        assert_rgb(load_image(opened), PIXELS)
        assert_rgb(load_image(opened.convert("RGB")), PIXELS)  # as the model card calls it


def test_a_jpeg_from_a_turned_camera(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "green").save(tmp_path / "a.jpg", exif=turned(6))
    assert load_image(tmp_path / "a.jpg").size == (32, 64)


def test_16_bit_grey_is_turned_too(tmp_path: Path) -> None:
    image = Image.fromarray(np.ascontiguousarray(np.rot90(GREY_16, -1)))
    assert_rgb(through_file(image, tmp_path / "a.png", exif=turned(8)), repeated(np.round(GREY_16 / 257.0)))


# --- what is no picture -------------------------------------------------------------------------------------------


def test_a_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such picture: .*none\.png"):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("data", [b"", b"hello, I am no picture"])
def test_no_picture(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"expected a picture \(PNG, JPEG, WebP, …\), could not read .*a\.png"):
        load_image(tmp_path / "a.png")


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.tile(PIXELS, (4, 4, 1))).save(stream, kind)
    return stream.getvalue()


def test_a_truncated_jpeg(tmp_path: Path) -> None:
    data = encoded("JPEG")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("error", [RuntimeError, SyntaxError, struct.error, EOFError])
def test_whatever_a_decoder_raises_is_one_error_that_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's raise of many kinds on damaged data: its AVIF decoder RuntimeError, its PNG decoder SyntaxError."""

    def load(self: Image.Image) -> None:
        raise error("broken\ndata")

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InputError, match=r"could not read .*a\.png: broken data"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_damaged_files_are_pictures_or_bad_input(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    whole = encoded(kind)
    path = tmp_path / "damaged"
    lines = []
    for i in range(40):
        data = bytearray(whole[: rng.randrange(len(whole))] if i % 2 else whole)
        for _ in range(3 if data else 0):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_image(path).mode == "RGB"
        except InputError as error:
            lines.append(str(error))
    assert len(lines) >= 10
    assert all(str(path) in line and "\n" not in line for line in lines)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the message says how to lift the limit."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        with pytest.raises(
            InputError, match=r"240 pixels.*shrink it first, or, .* set PIL\.Image\.MAX_IMAGE_PIXELS = None"
        ):
            load_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert_rgb(load_image(tmp_path / "a.png"), PIXELS)


def test_memory_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InputError, match=r"could not read .*a\.png: MemoryError"):
        load_image(tmp_path / "a.png")


def within(seconds: float, work: Callable[[], object]) -> object:
    """What the work returns or raises; a failure where it hangs."""
    result: Future[object] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "endless device", "folder"])
def test_only_files_are_read(kind: str, tmp_path: Path) -> None:
    """A pipe without a writer would hang, and so would some devices."""
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path.symlink_to("/dev/zero" if kind == "endless device" else "/dev/tty")
    with pytest.raises(InputError, match=r"could not read .*a\.png: a folder, a pipe or a device is no picture"):
        within(20, lambda: load_image(path))


def test_an_opened_picture_that_is_damaged(tmp_path: Path) -> None:
    data = encoded("JPEG")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "a.jpg") as opened, pytest.raises(InputError, match="truncated"):
        load_image(opened)


# --- over http ----------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A picture, a page that is none, an answer cut short, and nothing."""

    def do_GET(self) -> None:
        bodies = {"/a.png": encoded("PNG"), "/page": b"<html>hello</html>", "/short": encoded("PNG")[:40]}
        body = bodies.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(10_000 if self.path == "/short" else len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def test_an_address(address: str) -> None:
    assert_rgb(load_image(f"{address}/a.png"), np.tile(PIXELS, (4, 4, 1)))


@pytest.mark.parametrize(
    ("path", "reason"), [("/none", "404"), ("/page", "cannot identify"), ("/short", "cut short"), ("/a b", "")]
)
def test_an_address_without_a_picture(address: str, path: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"expected a picture .*{address}{path}.*{reason}"):
        load_image(address + path)


def test_nobody_at_the_address() -> None:
    with pytest.raises(InputError, match=r"could not read http://127\.0\.0\.1:9/a\.png"):
        load_image("http://127.0.0.1:9/a.png")
