"""The judge: reads things, their relation and the background back out of a picture, by hue and geometry.

It knows how scenes are drawn, and nothing of the models. It was fixed before they were trained, and made stricter once
since (SQUARE, and checks in both directions). It looks at nothing but what a caption says: a thing is the pixels of one
hue, whatever is on it or else on the picture without colour, and a background its mean tone and the steps of its cells.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sdxl_ref.pocket.scenes import COLOURS, GROUNDS, SHAPES, SIZE, Array, Scene, Thing, inside

COLOURED = 0.14  # chroma (largest minus smallest of r, g, b) from which a pixel belongs to a thing
SMALLEST = 150  # pixels; less is a speck, not a thing
FIT = 0.7  # intersection over union with a shape, from which it is that shape
SQUARE = 1.3  # largest ratio of a thing's sides: every shape is as wide as it is high
MARGIN = 7  # pixels; the window in which a thing's pixels, its border among them, are left out of the background
CELL = 8  # pixels; the side of the cells in which a background's texture is read
STEP = 0.06  # difference of mean tone from which two cells differ
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A thing in a picture; x and y are the middle of its pixels. Its shape is "" where none fits."""

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True)
class Marks:
    """What of a scene a picture shows. `things` is whether there are as many as there should be."""

    things: bool
    colours: bool
    shapes: bool
    relation: bool  # True for a single thing, which has none
    ground: bool
    texture: bool

    @property
    def all_right(self) -> bool:
        return all(vars(self).values())

    @property
    def count(self) -> int:
        """How many are right."""
        return sum(vars(self).values())


def judge(picture: Array, scene: Scene) -> Marks:
    """Compare a picture (128,128,3) in [0,1] with a scene. Things are matched to the scene's as fits best."""
    coloured = picture.max(axis=2) - picture.min(axis=2) > COLOURED
    things = find_things(picture, coloured)
    ground, texture = background(picture, coloured)
    ground_is_right = ground == scene.ground
    texture_is_right = texture == scene.texture
    if len(things) != len(scene.things):
        return Marks(False, False, False, False, ground_is_right, texture_is_right)
    candidates = [compare(order, scene, ground_is_right, texture_is_right) for order in permutations(things)]
    return max(candidates, key=lambda marks: marks.count)


def compare(seen: tuple[Seen, ...], scene: Scene, ground_is_right: bool, texture_is_right: bool) -> Marks:
    """The marks of as many things as the scene has, in its order."""
    pairs = list(zip(seen, scene.things, strict=True))
    return Marks(
        things=True,
        colours=all(candidate.thing.colour == thing.colour for candidate, thing in pairs),
        shapes=all(candidate.thing.shape == thing.shape for candidate, thing in pairs),
        relation=scene.relation is None or relation(*seen) == scene.relation,
        ground=ground_is_right,
        texture=texture_is_right,
    )


def relation(first: Seen, second: Seen) -> str:
    """How the first thing stands to the second, along the axis on which they are further apart."""
    dx = first.x - second.x
    dy = first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def find_things(picture: Array, coloured: Mask) -> list[Seen]:
    """Connected regions of one hue, large enough to be things."""
    colour_of = np.full(coloured.shape, -1)  # an index in COLOURS for each pixel, -1 for one without a colour
    colour_of[coloured] = nearest_colours(picture[coloured])
    things = []
    for i, colour in enumerate(COLOURS):
        for rows, columns in regions(colour_of == i):
            things.append(Seen(Thing(colour, shape_of(rows, columns)), columns.mean(), rows.mean()))
    return things


def nearest_colours(pixels: Array) -> NDArray[np.int64]:
    """The index in COLOURS of the nearest hue of each pixel: (n,3) -> (n,)."""
    hues = hue(np.asarray(list(COLOURS.values())))  # (6,)
    distance = np.abs(hue(pixels)[:, None] - hues)  # (n,6), in turns
    return np.minimum(distance, 1 - distance).argmin(axis=1)


def hue(colours: NDArray[Any]) -> NDArray[np.float64]:
    """(...,3) -> the angle on the colour wheel (...), in turns, from -1/2 to 1/2."""
    red, green, blue = np.moveaxis(colours.astype(np.float64), -1, 0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)


def regions(mask: Mask) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows and columns of the 8-connected parts of a mask (h,w) that have at least SMALLEST pixels.

    Each pixel takes the largest number around it until no number spreads any more, within the mask's bounding box.
    """
    rows, columns = np.nonzero(mask)
    if len(rows) < SMALLEST:
        return []
    top = rows.min()
    left = columns.min()
    box = torch.from_numpy(mask[top : rows.max() + 1, left : columns.max() + 1]).float()[None, None]  # (1,1,h,w)
    numbers = torch.arange(1, box.numel() + 1, dtype=torch.float32).reshape(box.shape) * box
    while True:
        spread = F.max_pool2d(numbers, 3, stride=1, padding=1) * box
        if torch.equal(spread, numbers):
            break
        numbers = spread
    values, counts = numbers[numbers > 0].unique(return_counts=True)
    parts = []
    for value in values[counts >= SMALLEST]:
        part_rows, part_columns = np.nonzero((numbers[0, 0] == value).numpy())
        parts.append((part_rows + top, part_columns + left))
    return parts


def shape_of(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> str:
    """The shape whose outline, stretched to the pixels' bounding box, covers them best; "" where none does."""
    top = rows.min()
    left = columns.min()
    height = rows.max() - top + 1
    width = columns.max() - left + 1
    if max(height, width) > SQUARE * min(height, width):
        return ""
    region = np.zeros((height, width), dtype=bool)
    region[rows - top, columns - left] = True
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = (x + 0.5) * 2 / width - 1  # -1 to 1 across the box
    y = (y + 0.5) * 2 / height - 1
    overlaps = {}
    for shape in SHAPES:
        radius = 1 / 0.9 if shape == "square" else 1.0
        ideal = inside(shape, x, y, radius) >= 0
        overlaps[shape] = (region & ideal).sum() / (region | ideal).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= FIT else ""


def background(picture: Array, coloured: Mask) -> tuple[str, str]:
    """Tone and texture of the pixels that belong to no thing (nor to its border)."""
    mask = torch.from_numpy(coloured).float()[None, None]  # (1,1,128,128)
    near_things = F.max_pool2d(mask, MARGIN, stride=1, padding=MARGIN // 2)[0, 0].numpy() > 0  # (128,128)
    if near_things.all():
        return "", ""
    grey = picture.mean(axis=2)
    level = float(grey[~near_things].mean())
    ground = min(GROUNDS, key=lambda name: abs(level - sum(GROUNDS[name]) / 2))
    return ground, texture_of(grey, ~near_things)


def texture_of(grey: Array, free: Mask) -> str:
    """Plain, striped or checkered, by the mean difference between cells of 8 pixels; "" for anything else.

    Stripes: a cell differs from the next one below. Checks are two cells wide: it differs from the next but one in
    both directions.
    """
    count = SIZE // CELL
    cells = grey.reshape(count, CELL, count, CELL).mean(axis=(1, 3))  # (128,128) -> (16,16)
    is_free = free.reshape(count, CELL, count, CELL).mean(axis=(1, 3)) > 0.5  # (128,128) -> (16,16)

    def differ(axis: int, distance: int) -> bool:
        """Whether free cells at this distance along an axis differ."""
        first = np.arange(count - distance)
        second = first + distance
        both_free = np.take(is_free, first, axis) & np.take(is_free, second, axis)
        difference = np.abs(np.take(cells, first, axis) - np.take(cells, second, axis))
        return bool(both_free.any() and difference[both_free].mean() > STEP)

    two_down = differ(axis=0, distance=2)
    two_across = differ(axis=1, distance=2)
    if two_down or two_across:
        return "checkered" if two_down and two_across else ""
    if differ(axis=1, distance=1):
        return ""
    return "striped" if differ(axis=0, distance=1) else "plain"
