"""Contact sheets: pictures in a grid, each with a line below it, or with labels of the rows and columns."""

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # white pixels between two pictures
LINE = 14  # pixels a line of text takes
SMALLEST = 12  # sizes of the labels' font, in pixels
LARGEST = 36
MOST_LINES = 3  # of a value
LONGEST = 500  # characters of a label that are looked at
ELLIPSIS = "…"
INK = "black"
PALE = "#777777"  # of the options' names
PAPER = "#e4e4e4"  # in the place of a picture that is missing

Label = Sequence[tuple[str, str]]  # (name, value)


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 0) -> Image.Image:
    """Row by row, as square a grid as it can be unless `columns` is given; captions are wrapped to the width."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    font = ImageFont.load_default(size=11)
    texts = [wrapped(caption, font, pictures[0].width) for caption in captions] or [""] * len(pictures)
    below = LINE * max(text.count("\n") + 1 if text else 0 for text in texts)
    width = pictures[0].width + GAP
    height = pictures[0].height + below + GAP
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = i % columns * width
        top = i // columns * height
        sheet.paste(picture, (left, top))
        ink.multiline_text((left, top + picture.height + 1), text, fill="black", font=font, spacing=2)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The words of a text in lines of at most `width` pixels; lines that it already has stay."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


class LabelledSheet:
    """Pictures in rows and columns with a label above each column and left of each row, put on one after the other.

    `cell` is the (width, height) of the largest picture. A label is some (name, value); texts are wrapped, and cut with
    an ellipsis where there is no room. `size` is known before anything is drawn. Pillow's own font has ASCII: letters
    lose their accents, and other characters are drawn as boxes.
    """

    def __init__(self, cell: tuple[int, int], across: Sequence[Label], down: Sequence[Label]) -> None:
        side = min(cell)
        self.cell = cell
        self.font = ImageFont.load_default(size=max(SMALLEST, min(side // 28, LARGEST)))
        self.line = math.ceil(sum(self.font.getmetrics()) * 1.1) if hasattr(self.font, "getmetrics") else LINE
        self.gap = max(GAP, side // 64)
        self.across = [self._lines(label, cell[0]) for label in across]
        room = max(cell[0] // 2, 8 * self.line)
        self.down = [self._lines(label, room) for label in down]
        widths = [self.font.getlength(text) for lines in self.down for text, _ in lines]
        self.left = math.ceil(max(widths)) + 2 * self.gap if widths else self.gap
        self.top = max(len(lines) for lines in self.across) * self.line + 2 * self.gap
        self.pitch = max(cell[1], *(len(lines) * self.line for lines in self.down)) + self.gap  # from row to row
        self.size = (self.left + len(across) * (cell[0] + self.gap), self.top + len(down) * self.pitch)
        self._image: Image.Image | None = None

    @property
    def image(self) -> Image.Image:
        """The sheet; drawn with its labels when it is first asked for."""
        if self._image is None:
            self._image = Image.new("RGB", self.size, "white")
            for column, lines in enumerate(self.across):
                left, top = self._corner(0, column)
                self._write(lines, left, top - self.gap - len(lines) * self.line)
            for row, lines in enumerate(self.down):
                self._write(lines, self.gap, self._corner(row, 0)[1])
        return self._image

    def put(self, row: int, column: int, picture: Image.Image) -> None:
        """Put a picture in its place; a smaller one in the middle of it."""
        left, top = self._corner(row, column)
        spare = (self.cell[0] - picture.width, self.cell[1] - picture.height)
        self.image.paste(picture, (left + spare[0] // 2, top + spare[1] // 2))

    def mark(self, row: int, column: int, reason: str) -> None:
        """Say in the place of a picture why there is none."""
        left, top = self._corner(row, column)
        self.image.paste(PAPER, (left, top, left + self.cell[0], top + self.cell[1]))
        most = max(1, self.cell[1] // self.line - 1)
        room = self.cell[0] - 2 * self.gap
        lines = [(line, INK) for line in shortened(reason, self.font, room, most)]
        self._write(lines, left + self.gap, top + self.gap)

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """The left and top of a place."""
        return self.left + column * (self.cell[0] + self.gap), self.top + row * self.pitch

    def _lines(self, label: Label, width: int) -> list[tuple[str, str]]:
        """The lines of a label with their colours: of each pair the name, then the value."""
        lines = []
        for name, value in label:
            lines += [(line, PALE) for line in shortened(name, self.font, width, 1)]
            lines += [(line, INK) for line in shortened(value, self.font, width, MOST_LINES)]
        return lines

    def _write(self, lines: Sequence[tuple[str, str]], left: int, top: int) -> None:
        ink = ImageDraw.Draw(self.image)
        for i, (text, colour) in enumerate(lines):
            ink.text((left, top + i * self.line), text, fill=colour, font=self.font)


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """A text in at most so many lines of at most `width` pixels; an ellipsis stands for what has no room."""
    letters = unicodedata.normalize("NFKD", text[:LONGEST].encode(errors="replace").decode())
    printable = " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())
    lines = wrapped(printable, font, width).split("\n")
    if len(lines) > most or len(text) > LONGEST:
        lines = lines[:most]
        lines[-1] += ELLIPSIS
    return [cut(line, font, width) for line in lines]


def cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A line, or as much of its beginning as has room with an ellipsis."""
    shorter = line
    while shorter and font.getlength(line) > width:
        shorter = shorter[:-1].rstrip()
        line = shorter + ELLIPSIS
    return line
