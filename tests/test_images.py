"""Pictures of every kind in, the size rule, exact tensors, PNG files with their settings."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdxl_ref.config import InputError
from sdxl_ref.images import fit, from_tensor, load_image, save_png, to_rgb, to_tensor

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


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp"])
def test_rgb_is_taken_as_it_is(suffix: str, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    assert_rgb(through_file(Image.fromarray(PIXELS), tmp_path / f"a.{suffix}", **options), PIXELS)


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


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette(suffix: str, tmp_path: Path) -> None:
    image, colours, _ = palette_image()
    assert_rgb(through_file(image, tmp_path / f"a.{suffix}"), colours)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_one_transparent_colour(suffix: str, tmp_path: Path) -> None:
    image, colours, index = palette_image()
    expected = np.where(index[..., None] == 3, 255, colours)
    assert_rgb(through_file(image, tmp_path / f"a.{suffix}", transparency=3), expected)


def test_palette_with_an_alpha_for_each_colour(tmp_path: Path) -> None:
    image, colours, index = palette_image()
    alphas = np.array([0, 64, 128, 200, 255], dtype=np.uint8)
    loaded = through_file(image, tmp_path / "a.png", transparency=alphas.tobytes())
    assert_rgb(loaded, over_white(colours, alphas[index]), 1)


def test_rgb_with_one_transparent_colour(tmp_path: Path) -> None:
    pixels = PIXELS.copy()
    pixels[3:6, 4:9] = (10, 20, 30)
    expected = np.where((pixels == (10, 20, 30)).all(axis=2, keepdims=True), 255, pixels)
    assert_rgb(through_file(Image.fromarray(pixels), tmp_path / "a.png", transparency=(10, 20, 30)), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey(name: str, tmp_path: Path) -> None:
    """Divided by 257, so that 65535 is 255; not clipped, not shifted."""
    expected = repeated(np.round(GREY_16 / 257.0))
    assert_rgb(through_file(Image.fromarray(GREY_16), tmp_path / name), expected)


def test_16_bit_grey_of_either_byte_order_and_in_32_bits() -> None:
    expected = repeated(np.round(GREY_16 / 257.0))
    for data, mode in ((GREY_16.astype("<u2"), "I;16"), (GREY_16.astype(">u2"), "I;16B"), (GREY_16.astype("<i4"), "I")):
        image = Image.frombytes(mode, (20, 12), data.tobytes())
        assert image.mode == mode
        assert_rgb(to_rgb(image), expected)


def png_16(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png(colour_type: int, channels: int, tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (12, 20, channels))
    (tmp_path / "a.png").write_bytes(png_16(values, colour_type))
    scaled = values / 257.0
    colour = scaled[..., :3] if channels > 2 else np.repeat(scaled[..., :1], 3, axis=2)
    alpha = scaled[..., -1] if channels in (2, 4) else np.full((12, 20), 255.0)
    levels = 2 if channels in (2, 4) else 1  # but for plain grey, Pillow itself keeps the upper 8 of the 16 bits
    assert_rgb(load_image(tmp_path / "a.png"), over_white(colour, alpha), levels)


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


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_rgb(load_image(tmp_path / "a.gif"), np.full((16, 16, 3), (255, 0, 0)))


# --- orientation --------------------------------------------------------------------------------------------------

STORED = {  # how the camera stores an upright picture u under each EXIF orientation
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.transpose(1, 0, 2),
    6: lambda u: np.rot90(u, 1),
    7: lambda u: np.rot90(u, 2).transpose(1, 0, 2),
    8: lambda u: np.rot90(u, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS))).save(path, exif=exif, **options)
    upright = load_image(path)
    assert_rgb(upright, PIXELS)
    assert_rgb(load_image(upright), PIXELS)  # turned once, not twice
    with Image.open(path) as opened:
        assert_rgb(load_image(opened), PIXELS)
        assert_rgb(load_image(opened.convert("RGB")), PIXELS)  # as the model card calls it


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_unknown_orientation_changes_nothing(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert_rgb(through_file(Image.fromarray(PIXELS), tmp_path / "a.png", exif=exif), PIXELS)


def test_a_jpeg_from_a_turned_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (64, 32), "green").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (32, 64)


def test_16_bit_grey_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    stored = np.ascontiguousarray(np.rot90(GREY_16, -1))
    assert_rgb(
        through_file(Image.fromarray(stored), tmp_path / "a.png", exif=exif), repeated(np.round(GREY_16 / 257.0))
    )


# --- what is no picture -------------------------------------------------------------------------------------------


def test_a_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such picture: .*none\.png"):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("data", [b"", b"hello, I am no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_no_picture(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"expected a picture \(PNG, JPEG, WebP, …\), could not read .*a\.png"):
        load_image(tmp_path / "a.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a picture"):
        load_image(tmp_path)


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.tile(PIXELS, (4, 4, 1))).save(stream, kind, **options)
    return stream.getvalue()


def test_a_truncated_jpeg(tmp_path: Path) -> None:
    data = encoded("JPEG")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_image(tmp_path / "a.jpg")


Image.init()
KINDS = [
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF") if kind in Image.SAVE
]  # AVIF: Pillow 11


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_pictures_or_bad_input(kind: str, tmp_path: Path) -> None:
    """Whatever Pillow's decoder raises (AVIF: RuntimeError) comes out as InputError that names the file."""
    rng, whole, path = random.Random(kind), encoded(kind), tmp_path / "damaged"
    lines = []
    for i in range(80):
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


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="240 pixels"):
        load_image(tmp_path / "a.png")


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
    ("path", "reason"), [("/none", "404"), ("/page", "cannot identify"), ("/short", "IncompleteRead"), ("/a b", "")]
)
def test_an_address_without_a_picture(address: str, path: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"expected a picture .*{address}{path}.*{reason}"):
        load_image(address + path)


def test_nobody_at_the_address() -> None:
    with pytest.raises(InputError, match=r"could not read http://127\.0\.0\.1:9/a\.png"):
        load_image("http://127.0.0.1:9/a.png")


# --- the size rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "box"),  # left, top, right, bottom
    [
        ((64, 64), (0, 0, 64, 64)),
        ((8, 8), (0, 0, 8, 8)),
        ((65, 71), (0, 3, 64, 67)),
        ((66, 15), (1, 3, 65, 11)),
        ((1023, 9), (3, 0, 1019, 8)),
    ],
)
def test_the_centre_is_cropped_to_multiples_of_8(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    places = np.dstack([x % 256, x // 256, y]).astype(np.uint8)
    left, top, right, bottom = box
    assert_rgb(fit(Image.fromarray(places)), places[top:bottom, left:right])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2048, 2048), (1024, 1024)),
        ((3000, 3000), (1024, 1024)),
        ((4000, 3000), (1176, 880)),  # 1182.4 x 886.8
        ((3000, 4000), (880, 1176)),
        ((1025, 1024), (1024, 1016)),  # 1024.5 x 1023.5
        ((1920, 1080), (1360, 768)),  # 1365.3 x 768.0
        ((512, 2048), (512, 2048)),
        ((900, 1165), (896, 1160)),  # within the area: only cropped
        ((4520, 5800), (896, 1152)),  # 903.97 x 1159.96; 904 x 1160 would be 64 pixels too many
    ],
)
def test_large_pictures_are_shrunk_to_the_area(size: tuple[int, int], expected: tuple[int, int]) -> None:
    fitted = fit(Image.new("L", size, 77), 1024 * 1024)
    assert fitted.size == expected
    assert fitted.getextrema() == (77, 77)


def test_fitted_pictures_never_exceed_the_area_and_keep_their_proportions() -> None:
    rng = random.Random(0)
    for _ in range(200):
        size, area = (rng.randint(8, 300), rng.randint(8, 300)), rng.choice([4096, 5000, 10_000, 65_536])
        width, height = fit(Image.new("1", size), area).size
        assert width % 8 == height % 8 == 0
        assert 0 < width * height <= area
        scale = min(1.0, math.sqrt(area / (size[0] * size[1])))
        assert -9 < width - scale * size[0] <= 1e-9
        assert -9 < height - scale * size[1] <= 1e-9


def test_shrinking_smooths() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # nearest neighbour would keep one of the two
    inner = np.asarray(fit(Image.fromarray(stripes), 16 * 16))[4:-4, 4:-4]
    assert np.abs(inner.astype(float) - 127.5).max() < 4


def test_nothing_is_enlarged() -> None:
    assert fit(Image.new("RGB", (16, 24)), 1024 * 1024).size == (16, 24)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (7, 7), (8, 7), (1_000_000, 9)])
def test_too_thin_pictures(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"at least 8x8 pixels, found {size[0]}x{size[1]}"):
        fit(Image.new("L", size), 1024 * 1024)


# --- tensors ------------------------------------------------------------------------------------------------------


def test_tensors_are_in_minus_one_to_one() -> None:
    corners = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [0, 0, 51]]], dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(corners))
    assert tensor.shape == (1, 3, 2, 2)
    assert tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert tensor[0, :, 0, 1].tolist() == [1, 1, 1]
    assert tensor[0, :, 1, 0].tolist() == [1, -1, -1]
    assert tensor[0, 2, 1, 1] == pytest.approx(-0.6)


def test_every_level_survives_the_round_trip() -> None:
    levels = np.stack([RNG.permutation(256) for _ in range(3)], axis=1).astype(np.uint8).reshape(16, 16, 3)
    [image] = from_tensor(to_tensor(Image.fromarray(levels)) * 0.5 + 0.5)
    assert_rgb(image, levels)


def test_from_tensor_rounds_to_the_nearest_level_and_clips() -> None:
    values = torch.tensor([-3.0, 0.0, 0.4, 0.6, 127.4, 254.6, 255.0, 999.0]) / 255
    [image] = from_tensor(values.expand(1, 3, 1, -1))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 127, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_from_tensor_takes_other_dtypes_and_batches(dtype: torch.dtype) -> None:
    batch = torch.tensor([0.0, 1.0, 0.5]).reshape(3, 1, 1, 1).expand(3, 3, 2, 4).to(dtype)
    images = from_tensor(batch)
    assert [image.getpixel((1, 1)) for image in images] == [(0, 0, 0), (255, 255, 255), (128, 128, 128)]
    assert images[0].size == (4, 2)


def test_tensors_are_those_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor, image = VaeImageProcessor(vae_scale_factor=8), Image.fromarray(np.tile(PIXELS, (2, 2, 1)))
    assert image.size == (40, 24)
    assert torch.equal(to_tensor(image), processor.preprocess(image))
    decoded = torch.randn((3, 3, 24, 40), generator=torch.Generator().manual_seed(0))
    theirs = processor.postprocess(decoded, output_type="pil")
    for a, b in zip(from_tensor(decoded * 0.5 + 0.5), theirs, strict=True):
        assert_rgb(a, np.asarray(b))


# --- PNG with settings --------------------------------------------------------------------------------------------

SETTINGS = {
    "prompt": "a café, 北京 🙂\nsecond line",
    "negative_prompt": "blurry",
    "num_inference_steps": 50,
    "sampler": "euler",
    "spacing": "leading",
    "guidance_scale": 5.0,
    "seed": 0,
    "size": "40x24",
    "strength": 0.3,
    "sigmas": [0.5692766904830933, 0.1, 0.0],
    "checkpoint": {"sha256": "0123456789abcdef"},
    "versions": {"sdxl_ref": "0.1.0"},
}


def test_a_png_carries_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    save_png(Image.fromarray(PIXELS), path, SETTINGS)
    assert os.listdir(tmp_path) == ["out.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert_rgb(image, PIXELS)
        assert json.loads(image.text["sdxl_ref"]) == SETTINGS  # type: ignore[attr-defined]
        assert image.text["parameters"] == (  # type: ignore[attr-defined]
            "a café, 北京 🙂\nsecond line\nNegative prompt: blurry\nSteps: 50, Sampler: euler, Schedule type: leading, "
            "CFG scale: 5.0, Seed: 0, Size: 40x24, Denoising strength: 0.3, Model hash: 0123456789, "
            "Version: sdxl-ref 0.1.0"
        )


def test_the_parameters_leave_out_what_there_is_not(tmp_path: Path) -> None:
    settings = {"prompt": "a cat", "negative_prompt": "", "seed": None, "versions": {"sdxl_ref": "0.1.0"}}
    save_png(Image.fromarray(PIXELS), tmp_path / "out.png", settings)
    with Image.open(tmp_path / "out.png") as image:
        assert image.text["parameters"] == "a cat\nVersion: sdxl-ref 0.1.0"  # type: ignore[attr-defined]


def test_a_prompt_of_broken_bytes_can_be_saved(tmp_path: Path) -> None:
    """A shell hands bytes that are no UTF-8 over as lone surrogates."""
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    save_png(Image.fromarray(PIXELS), tmp_path / "out.png", SETTINGS | {"prompt": prompt})
    with Image.open(tmp_path / "out.png") as image:
        assert image.text["parameters"].startswith("caf?\n")  # type: ignore[attr-defined]
        assert json.loads(image.text["sdxl_ref"])["prompt"] == prompt  # type: ignore[attr-defined]


def test_a_new_picture_replaces_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"old")
    save_png(Image.fromarray(PIXELS), tmp_path / "out.png", SETTINGS)
    assert_rgb(load_image(tmp_path / "out.png"), PIXELS)


def full_disk(self: Image.Image, target: Path, **_: Any) -> None:
    target.write_bytes(b"half a pictu")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match=r"could not write .*out\.png: No space left on device"):
        save_png(Image.fromarray(PIXELS), path, SETTINGS)
    assert os.listdir(tmp_path) == ["out.png"]
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Image.Image, target: Path, **_: Any) -> None:
        target.write_bytes(b"half a pictu")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.fromarray(PIXELS), tmp_path / "out.png", SETTINGS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["folder", "missing/out.png", "a" * 300 + ".png"])
def test_places_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="could not write"):
        save_png(Image.fromarray(PIXELS), tmp_path / name, SETTINGS)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    save_png(Image.fromarray(PIXELS), path, SETTINGS)
    assert os.listdir(tmp_path) == [path.name]


def test_the_chunks_are_read_by_the_plain_format(tmp_path: Path) -> None:
    """International text chunks, uncompressed, before the pixels: what viewers look for."""
    save_png(Image.fromarray(PIXELS), tmp_path / "out.png", SETTINGS)
    names = []
    with (tmp_path / "out.png").open("rb") as file:
        stream = PngImagePlugin.ChunkStream(file)
        file.seek(8)
        while not names or names[-1] != b"IEND":
            name, position, length = stream.read()
            names.append(name)
            file.seek(position + length + 4)
    assert names[0] == b"IHDR"
    assert names.count(b"iTXt") == 2
    assert max(i for i, name in enumerate(names) if name == b"iTXt") < names.index(b"IDAT")
