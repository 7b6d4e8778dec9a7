"""Colour profiles to sRGB as littlecms makes it, transparency of every form, and what is said of a bad profile."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import profiles
import pytest
from PIL import Image, ImageCms

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import load_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)  # (h,w,3)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
INK = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
P3 = profiles.display_p3()
PROFILES = {"Display P3": P3, "gamma 1.8": profiles.rgb(profiles.P3, 1.8)}


def littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    """What littlecms makes of it in sRGB, with the perceptual intent."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def loaded(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    """A picture through a file; without a warning."""
    image.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(load_image(path))


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return pixels * share + 255.0 * (1 - share)


# --- profiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "shown"),
    [((234, 51, 35), (255, 0, 0)), ((117, 251, 76), (3, 255, 0)), ((218, 176, 150), (226, 174, 146))],
)
def test_a_phones_photo(stored: tuple[int, int, int], shown: tuple[int, int, int], tmp_path: Path) -> None:
    """Display P3: sRGB's own red and green, and a skin tone."""
    assert tuple(loaded(Image.new("RGB", (8, 8), stored), tmp_path / "a.png", icc_profile=P3)[4, 4]) == shown


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("name", PROFILES)
def test_rgb(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    found = loaded(Image.fromarray(PIXELS), path, icc_profile=PROFILES[name], **options)
    with Image.open(path) as stored:
        expected = littlecms(stored, PROFILES[name])
    assert np.array_equal(found, expected)
    assert np.abs(found.astype(int) - PIXELS).max() > 20


def test_a_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    assert np.array_equal(loaded(Image.fromarray(PIXELS), tmp_path / "a.png", icc_profile=profiles.srgb()), PIXELS)


def test_a_profile_counts_once(tmp_path: Path) -> None:
    """However the picture comes: as a file, opened, or opened and converted as the model card does."""
    path = tmp_path / "a.png"
    expected = loaded(Image.fromarray(PIXELS), path, icc_profile=P3)
    with Image.open(path) as opened:
        for picture in (opened, opened.convert("RGB"), opened.convert("RGBA"), load_image(path)):
            assert np.array_equal(np.asarray(load_image(picture)), expected)
    assert load_image(path).info == {}


def test_a_turned_photo_with_a_profile(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(PIXELS)))
    found = loaded(turned, tmp_path / "a.png", icc_profile=P3, exif=exif)
    assert np.array_equal(found, littlecms(Image.fromarray(PIXELS), P3))


def test_transparency_goes_over_white_after_the_profile(tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([PIXELS, ALPHA]))
    found = loaded(image, tmp_path / "a.png", icc_profile=P3)
    expected = over_white(littlecms(Image.fromarray(PIXELS), P3), ALPHA)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("transparent", [None, 3])
def test_a_palette_with_a_profile(transparent: int | None, tmp_path: Path) -> None:
    index = RNG.integers(0, 5, (12, 20), dtype=np.uint8)
    colours = RNG.integers(0, 256, (5, 3), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    found = loaded(image, tmp_path / "a.png", icc_profile=P3, **options)
    expected = littlecms(Image.fromarray(colours[index]), P3)
    assert np.array_equal(found, np.where(index[..., None] == transparent, 255, expected))


def test_grey_by_a_profile_of_grey(tmp_path: Path) -> None:
    """By the definition of a curve: v^1.8 of the white, in sRGB's own curve."""
    found = loaded(Image.fromarray(GREY), tmp_path / "a.png", icc_profile=profiles.grey(1.8))
    light = (GREY / 255.0) ** 1.8
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    wrong = np.abs(found - expected[..., None])[GREY > 16]  # below, 8 bits of littlecms' curve are coarse
    assert wrong.max() <= 1
    assert np.array_equal(found, littlecms(Image.fromarray(GREY), profiles.grey(1.8)))


def test_grey_by_a_profile_of_rgb(tmp_path: Path) -> None:
    """Editors write such files; grey is a colour of RGB."""
    found = loaded(Image.fromarray(GREY), tmp_path / "a.png", icc_profile=PROFILES["gamma 1.8"])
    assert np.array_equal(found, littlecms(Image.fromarray(GREY).convert("RGB"), PROFILES["gamma 1.8"]))


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_other_grey_by_a_profile_of_grey(mode: str, tmp_path: Path) -> None:
    image = (
        Image.fromarray(GREY > 127) if mode == "1" else Image.merge("LA", [Image.fromarray(x) for x in (GREY, ALPHA)])
    )
    found = loaded(image, tmp_path / "a.png", icc_profile=profiles.grey(1.8))
    expected = littlecms(image.convert("L"), profiles.grey(1.8))
    assert np.abs(found - (expected if mode == "1" else over_white(expected, ALPHA))).max() <= 1


def test_16_bit_grey_by_a_profile(tmp_path: Path) -> None:
    levels = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
    found = loaded(Image.fromarray(levels), tmp_path / "a.png", icc_profile=profiles.grey(1.8))
    eight = Image.fromarray((levels / 257.0).round().astype(np.uint8))
    assert np.array_equal(found, littlecms(eight, profiles.grey(1.8)))


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_by_its_profile(suffix: str, tmp_path: Path) -> None:
    """A printer's inks are not those of Pillow's plain formula."""
    image = Image.frombytes("CMYK", (20, 12), INK.tobytes())
    found = loaded(image, tmp_path / f"a.{suffix}", icc_profile=profiles.cmyk())
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        expected = littlecms(stored, profiles.cmyk())
        plain = np.asarray(stored.convert("RGB"))
    assert np.array_equal(found, expected)
    assert np.abs(found.astype(int) - plain).max() > 50


def test_lab(tmp_path: Path) -> None:
    """Which is its own profile; there and back loses what 8 bits of Lab cannot hold."""
    smooth = np.asarray(Image.radial_gradient("L").resize((20, 12)))
    pixels = np.dstack([smooth // 2 + 70, smooth // 3 + 80, 200 - smooth // 2])
    there = ImageCms.profileToProfile(
        Image.fromarray(pixels), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(loaded(there, tmp_path / "a.tiff").astype(int) - pixels).max() <= 6


def test_a_pngs_gamma_is_left_alone(tmp_path: Path) -> None:
    data = png(PIXELS.reshape(12, -1), (20, 8, 2), [(b"gAMA", struct.pack(">I", 100_000))])
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), PIXELS)


# --- profiles that cannot be used ---------------------------------------------------------------------------------

HEADER_ONLY = P3[:128] + struct.pack(">I", 0)
DAMAGED = {
    "no profile": b"hello",
    "cut short": P3[:200],
    "a header alone": struct.pack(">I", len(HEADER_ONLY)) + HEADER_ONLY[4:],
    "without primaries": profiles.profile(b"RGB ", b"XYZ ", b"mntr", {}),
    "zeros": b"\0" * 500,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_profile_is_told(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, icc_profile=DAMAGED[case])
    with pytest.warns(UserWarning, match=r"the colour profile of .*a\.png is damaged .*: it is left out, the colours"):
        assert np.array_equal(np.asarray(load_image(path)), PIXELS)


def test_randomly_damaged_profiles_are_used_or_told(tmp_path: Path) -> None:
    rng = random.Random(0)
    told = 0
    for _ in range(40):
        data = bytearray(P3)
        for _ in range(4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        Image.fromarray(PIXELS).save(tmp_path / "a.png", icc_profile=bytes(data))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            picture = load_image(tmp_path / "a.png")
        assert picture.mode == "RGB"
        assert all("the colour profile of" in str(warning.message) for warning in caught)
        told += len(caught)
    assert 5 <= told <= 40


OTHERS = {
    "RGB, for CMYK": (Image.fromarray(PIXELS), profiles.cmyk(), "is for CMYK, and the picture is RGB"),
    "RGB, for grey": (Image.fromarray(PIXELS), profiles.grey(1.8), "is for GRAY, and the picture is RGB"),
    "grey, for CMYK": (Image.fromarray(GREY), profiles.cmyk(), "is for CMYK, and the picture is L"),
    "CMYK, for RGB": (Image.frombytes("CMYK", (20, 12), INK.tobytes()), P3, "is for RGB, and the picture is CMYK"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_profile_for_another_kind_of_picture_is_told(case: str, tmp_path: Path) -> None:
    image, profile, message = OTHERS[case]
    path = tmp_path / "a.tiff"
    image.save(path, icc_profile=profile)
    with pytest.warns(UserWarning, match=message):
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(image.convert("RGB")))


# --- transparent levels and colours -------------------------------------------------------------------------------


def png(rows: np.ndarray, form: tuple[int, int, int], extra: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG by its definition (ISO 15948): rows of packed bytes; `form` is width, bit depth and colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width, depth, colour_type = form
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *(chunk(*pair) for pair in extra)]
    chunks.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_with_a_transparent_level(depth: int, tmp_path: Path) -> None:
    """Of any depth: the level counts on the scale of the file (11.3.2.1), its pixels become white."""
    most = 2**depth - 1
    levels = np.random.default_rng(depth).integers(0, most + 1, (6, 16))
    transparent = int(levels[2, 3])
    if depth == 16:
        rows = levels.astype(">u2")
    elif depth == 8:
        rows = levels.astype(np.uint8)
    else:
        bits = (levels[..., None] >> np.arange(depth)[::-1]) & 1  # (h,w,depth)
        rows = np.packbits(bits.reshape(6, -1).astype(np.uint8), axis=1)
    (tmp_path / "a.png").write_bytes(png(rows, (16, depth, 0), [(b"tRNS", struct.pack(">H", transparent))]))
    expected = np.where(levels == transparent, 255, np.round(levels * 255 / most))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    """Pillow keeps the upper 8 of 16 bits."""
    values = RNG.integers(0, 65536, (6, 16, 3))
    values[1, 4] = values[3, 7]
    rows = values.astype(">u2").reshape(6, -1)
    data = png(rows, (16, 16, 2), [(b"tRNS", struct.pack(">HHH", *values[3, 7]))])
    (tmp_path / "a.png").write_bytes(data)
    transparent = (values == values[3, 7]).all(axis=2, keepdims=True)
    assert transparent.sum() == 2
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.where(transparent, 255, values >> 8))


@pytest.mark.parametrize("levels", [(-1, 5), (0, 65536), (0, 2**31 - 1)])
def test_levels_of_more_than_16_bits_are_refused(levels: tuple[int, int], tmp_path: Path) -> None:
    """Their white is not known: cut at 65535 they would be another picture."""
    Image.fromarray(np.array([levels] * 8, dtype=np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"8 or 16 bits, found levels from {levels[0]} to {levels[1]}"):
        load_image(tmp_path / "a.tiff")
