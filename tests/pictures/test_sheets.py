"""Contact sheets: where pictures and captions stand."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from sdxl_ref.pictures.sheets import GAP, LINE, contact_sheet, wrapped

COLOURS = ("red", "green", "blue", "yellow", "black")
WIDTH, HEIGHT = 40, 24


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in COLOURS[:count]]


@pytest.mark.parametrize(
    ("count", "columns", "grid"), [(1, 0, (1, 1)), (2, 0, (2, 1)), (4, 0, (2, 2)), (5, 0, (3, 2)), (5, 2, (2, 3))]
)
def test_pictures_stand_row_by_row_with_gaps_between(count: int, columns: int, grid: tuple[int, int]) -> None:
    chosen = pictures(count)
    sheet = contact_sheet(chosen, columns=columns)
    across, down = grid
    assert sheet.size == (across * (WIDTH + GAP) - GAP, down * (HEIGHT + GAP) - GAP)
    expected = np.full((sheet.height, sheet.width, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(chosen):
        left = i % across * (WIDTH + GAP)
        top = i // across * (HEIGHT + GAP)
        expected[top : top + HEIGHT, left : left + WIDTH] = np.asarray(picture)
    assert np.array_equal(np.asarray(sheet), expected)


def test_captions_stand_below_their_pictures() -> None:
    sheet = np.asarray(contact_sheet(pictures(2), ["one", "two"], columns=2))
    assert sheet.shape == (HEIGHT + LINE, 2 * WIDTH + GAP, 3)
    below = sheet[HEIGHT:].min(axis=(0, 2)) < 128  # columns of pixels with ink
    assert below[:WIDTH].any()
    assert below[WIDTH + GAP :].any()
    assert not below[WIDTH : WIDTH + GAP].any()


def test_the_longest_caption_makes_room_for_all() -> None:
    sheet = contact_sheet(pictures(2), ["a", "a\nb\nc"], columns=2)
    assert sheet.height == HEIGHT + 3 * LINE


def test_captions_are_as_many_as_pictures() -> None:
    with pytest.raises(ValueError, match="zip"):
        contact_sheet(pictures(2), ["one"])


def test_words_are_wrapped_to_the_width_and_lines_stay() -> None:
    font = ImageFont.load_default(size=11)
    text = "the quick brown fox\njumps over the lazy dog"
    lines = wrapped(text, font, 60).split("\n")
    assert " ".join(lines) == text.replace("\n", " ")
    assert any(line.endswith("fox") for line in lines)
    assert all(font.getlength(line) <= 60 for line in lines)
    assert wrapped(text, font, math.ceil(font.getlength(text))) == text
    assert wrapped("incomprehensibilities", font, 10) == "incomprehensibilities"  # a word is not cut
