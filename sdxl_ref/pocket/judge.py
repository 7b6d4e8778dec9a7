"""The judge: reads things, their relation and the background back out of a picture, by hue and geometry.

It knows how scenes are drawn, and nothing of the models. It was fixed before they were trained, and made stricter once
since (SQUARE, and checks in both directions). It looks at nothing but what a caption says: a thing is the pixels of one
hue, whatever is on it or else on the picture without colour, and a background its mean tone and the steps of its cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sdxl_ref.pocket.scenes import COLOURS, GROUNDS, OPPOSITE, SHAPES, Array, Scene, Thing, inside

COLOURED = 0.14  # chroma (largest minus smallest of r, g, b) from which a pixel belongs to a thing
SMALLEST = 150  # pixels; less is a speck, not a thing
FIT = 0.7  # intersection over union with a shape, from which it is that shape
SQUARE = 1.3  # largest ratio of a thing's sides: every shape is as wide as it is high
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture; x and y are the middle of its pixels. `shape` is "" where none fits."""

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


def judge(picture: Array, scene: Scene) -> Marks:
    """Compare a picture (128,128,3) in [0,1] with a scene. Things are told apart as the scene fits best."""
    coloured = picture.max(axis=2) - picture.min(axis=2) > COLOURED
    seen = things(picture, coloured)
    ground, texture = background(picture, coloured)
    grounds = ground == scene.ground, texture == scene.texture
    if len(seen) != len(scene.things):
        return Marks(False, False, False, False, *grounds)
    return max(
        (compare(order, scene, grounds) for order in permutations(seen)), key=lambda marks: sum(vars(marks).values())
    )


def compare(seen: tuple[Seen, ...], scene: Scene, grounds: tuple[bool, bool]) -> Marks:
    pairs = list(zip(seen, scene.things, strict=True))
    return Marks(
        True,
        all(each.thing.colour == thing.colour for each, thing in pairs),
        all(each.thing.shape == thing.shape for each, thing in pairs),
        scene.relation is None or relation(*seen) == scene.relation,
        *grounds,
    )


def relation(first: Seen, second: Seen) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    name = "left of" if abs(dx) > abs(dy) else "above"
    return name if (dx if name == "left of" else dy) < 0 else OPPOSITE[name]


def things(picture: Array, coloured: Mask) -> list[Seen]:
    """Connected regions of one hue, large enough to be things."""
    nearest = colour_names(picture)
    found = []
    for i, colour in enumerate(COLOURS):
        for region in regions(coloured & (nearest == i)):
            rows, columns = np.nonzero(region)
            found.append(Seen(Thing(colour, shape_of(rows, columns)), columns.mean(), rows.mean()))
    return found


def colour_names(picture: Array) -> NDArray[np.int64]:
    """The index in COLOURS of the nearest hue, pixel by pixel (128,128)."""
    away = np.abs(hue(picture)[:, :, None] - hue(np.asarray(list(COLOURS.values()))))
    return np.minimum(away, 1 - away).argmin(axis=2)


def hue(colours: NDArray[Any]) -> NDArray[np.float64]:
    """(..., 3) -> the angle on the colour wheel (...), in turns, from -1/2 to 1/2."""
    red, green, blue = np.moveaxis(colours.astype(np.float64), -1, 0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)


def regions(mask: Mask) -> list[Mask]:
    """The 8-connected parts of a mask that have at least SMALLEST pixels, by spreading the largest index."""
    if mask.sum() < SMALLEST:
        return []
    inside_ = torch.from_numpy(mask).float()[None, None]
    labels = torch.arange(1, mask.size + 1, dtype=torch.float32).reshape(inside_.shape) * inside_
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * inside_
        if torch.equal(spread, labels):
            break
        labels = spread
    values, counts = labels[labels > 0].unique(return_counts=True)
    return [(labels[0, 0] == value).numpy() for value in values[counts >= SMALLEST]]


def shape_of(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> str:
    """The shape whose outline, stretched to the pixels' bounding box, covers them best; "" where none does."""
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    if max(height, width) > SQUARE * min(height, width):
        return ""
    found = np.zeros((height, width), dtype=bool)
    found[rows - top, columns - left] = True
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1  # -1 to 1 across the box
    fits = {}
    for shape in SHAPES:
        ideal = inside(shape, x, y, 1 / 0.9 if shape == "square" else 1.0) >= 0
        fits[shape] = (found & ideal).sum() / (found | ideal).sum()
    best = max(fits, key=lambda shape: fits[shape])
    return best if fits[best] >= FIT else ""


def background(picture: Array, coloured: Mask) -> tuple[str, str]:
    """Tone and texture of the pixels that belong to no thing (nor to its border)."""
    near = F.max_pool2d(torch.from_numpy(coloured).float()[None, None], 7, stride=1, padding=3)[0, 0].numpy() > 0
    if near.all():
        return "", ""
    grey = picture.mean(axis=2)
    level = float(grey[~near].mean())
    ground = min(GROUNDS, key=lambda name: abs(level - sum(GROUNDS[name]) / 2))
    return ground, texture_of(grey, ~near)


def texture_of(grey: Array, free: Mask) -> str:
    """By the mean step between cells of 8 pixels: to the next one below striped, to the next but one in both directions
    checkered; "" for what is neither, nor plain.
    """
    cells = grey.reshape(16, 8, 16, 8).mean(axis=(1, 3))
    whole = free.reshape(16, 8, 16, 8).mean(axis=(1, 3)) > 0.5

    def step(axis: int, distance: int) -> float:
        a, b = (np.take(cells, range(*ends), axis) for ends in ((0, 16 - distance), (distance, 16)))
        use = np.take(whole, range(16 - distance), axis) & np.take(whole, range(distance, 16), axis)
        return float(np.abs(a - b)[use].mean()) if use.any() else 0.0

    down, across, two_down, two_across = (step(axis, n) > 0.06 for n in (1, 2) for axis in (0, 1))
    if two_down or two_across:  # two cells apart lie in different checks
        return "checkered" if two_down and two_across else ""
    if across:
        return ""
    return "striped" if down else "plain"
