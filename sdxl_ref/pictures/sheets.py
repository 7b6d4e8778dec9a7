"""Contact sheets: pictures of one size in a grid, each with a line below it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # white pixels between two pictures
LINE = 14  # pixels a line of text takes


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
