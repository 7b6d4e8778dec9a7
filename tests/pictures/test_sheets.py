"""Contact sheets: where pictures and captions stand."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from sdxl_ref.pictures.sheets import GAP, LINE, LONGEST, LabelledSheet, contact_sheet, shortened, wrapped

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


# --- labels of rows and columns -----------------------------------------------------------------------------------


def labelled(across: list[str], down: list[str], cell: tuple[int, int] = (WIDTH, HEIGHT)) -> LabelledSheet:
    return LabelledSheet(cell, [[("strength", text)] for text in across], [[("sampler", text)] for text in down])


def test_pictures_stand_below_and_right_of_their_labels() -> None:
    sheet = labelled(["0.1", "0.3"], ["euler"], cell=(80, 60))
    for column, colour in enumerate(("red", "blue")):
        sheet.put(0, column, Image.new("RGB", (80, 60), colour))
    pixels = np.asarray(sheet.image)
    assert (pixels.shape[1], pixels.shape[0]) == sheet.size
    assert (pixels[-GAP - 60 : -GAP, -GAP - 80 : -GAP] == (0, 0, 255)).all()
    assert (pixels[-GAP - 60 : -GAP, -2 * GAP - 160 : -2 * GAP - 80] == (255, 0, 0)).all()
    ink = pixels.max(axis=2) < 160
    assert ink[: -GAP - 60, -2 * GAP - 160 : -2 * GAP - 80].any()
    assert ink[: -GAP - 60, -GAP - 80 : -GAP].any()
    assert ink[-GAP - 60 : -GAP, : -3 * GAP - 160].any()


def test_a_sheet_without_rows_has_no_labels_on_its_left() -> None:
    sheet = LabelledSheet((WIDTH, HEIGHT), [[("seed", "1")]], [[]])
    assert sheet.size[0] == WIDTH + 2 * GAP


def test_a_smaller_picture_stands_in_the_middle() -> None:
    sheet = labelled(["1"], ["euler"], cell=(80, 80))
    sheet.put(0, 0, Image.new("RGB", (40, 40), "red"))
    pixels = np.asarray(sheet.image)[-GAP - 80 : -GAP, -GAP - 80 : -GAP]
    assert (pixels[20:60, 20:60] == (255, 0, 0)).all()
    assert (pixels[:20] == 255).all()


def test_labels_of_many_lines_make_rows_higher() -> None:
    names = ("sampler", "karras", "spacing", "seed")
    sheet = LabelledSheet((WIDTH, HEIGHT), [[("steps", "1")]], [[(name, "1") for name in names]] * 2)
    assert sheet.pitch == 2 * len(names) * sheet.line + GAP
    assert sheet.size[1] == sheet.top + 2 * sheet.pitch


def test_a_place_says_why_it_has_no_picture() -> None:
    sheet = labelled(["1"], ["euler"], cell=(80, 80))
    sheet.mark(0, 0, "values that are not finite")
    pixels = np.asarray(sheet.image)[-GAP - 80 : -GAP, -GAP - 80 : -GAP]
    assert tuple(pixels[-1, -1]) == (228, 228, 228)
    assert (pixels.max(axis=2) < 128).any()


def test_long_texts_are_cut_with_an_ellipsis() -> None:
    font = ImageFont.load_default(size=12)
    assert shortened("a cup", font, 100, 2) == ["a cup"]
    lines = shortened("a cup of coffee on a wooden table, in the morning light", font, 100, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    [name] = shortened("incomprehensibilities.safetensors", font, 100, 2)
    assert name.startswith("incompre")
    assert name.endswith("…")
    assert all(font.getlength(line) <= 100 for line in (*lines, name))
    assert shortened("a" * (LONGEST + 1), font, 10**6, 2) == ["a" * LONGEST + "…"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("café", "cafe"), ("a\n\tb", "a b"), ("猫", "猫"), ("🐈", "🐈"), ("\udcff", "?"), ("", "")],
    ids=ascii,
)
def test_any_text_can_be_drawn(text: str, shown: str) -> None:
    assert shortened(text, ImageFont.load_default(size=12), 100, 2) == [shown]
    assert labelled([text], [text]).image.width > WIDTH
