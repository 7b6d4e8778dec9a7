"""Scenes: captioned pictures of one or two shapes on a background, each drawn from a seed.

What a caption says: 4 shapes, 6 colours, 4 relations, 3 backgrounds in 3 textures. What it does not say, and a model
has to invent: places, sizes, light, and the pattern on each surface. Nothing is finer than 4 pixels.
Some combinations are held out of training (`Scene.held_out`), to measure composition.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
T = TypeVar("T")
SIZE = 128  # pixels a side
COLOURS = {
    "red": (0.88, 0.13, 0.13),
    "yellow": (0.93, 0.82, 0.10),
    "green": (0.10, 0.72, 0.16),
    "cyan": (0.12, 0.78, 0.85),
    "blue": (0.15, 0.25, 0.88),
    "pink": (0.92, 0.22, 0.78),
}
SHAPES = ("circle", "square", "triangle", "cross")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(OPPOSITE)
GROUNDS = {"white": (0.93, 0.80), "gray": (0.56, 0.43), "black": (0.07, 0.20)}  # the two tones of each
TEXTURES = ("plain", "striped", "checkered")
PROBE = ("blue circle", "red square")  # the model card's "a red cube on top of a blue sphere"; always held out
OUTLINE = 4.0  # pixels


@dataclass(frozen=True)
class Look:
    """How things are painted, which no caption tells: what a fine-tune can change."""

    pale: float = 0.0  # share of white in each colour
    outline: float = 0.55  # brightness of the outline: 0 is black, 1 none


USUAL = Look()
PASTEL = Look(pale=0.45, outline=1.0)  # pale colours, no outline: in no picture that the UNets were trained on


class Circle(NamedTuple):
    """Around a thing, in pixels."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True, order=True)
class Thing:
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says. With two things the first stands in `relation` to the second; with one it is None."""

    things: tuple[Thing, ...]
    relation: str | None
    ground: str
    texture: str

    @property
    def caption(self) -> str:
        things = f" {self.relation} ".join(f"a {thing}" for thing in self.things)
        return f"{things} on a {self.ground} {self.texture} background"

    @property
    def from_top_left(self) -> tuple[Thing, ...]:
        """The things from top to bottom, or from left to right: the same for both captions of one picture."""
        return self.things[::-1] if self.relation in ("below", "right of") else self.things

    @property
    def held_out(self) -> bool:
        """31 of all 276 pairs of things, and 13 of all 72 single things with a ground, are in no training picture.

        Such a single thing is in training pictures on that ground, but beside another.
        """
        names = tuple(sorted(str(thing) for thing in self.things))
        key = " + ".join(names if len(names) == 2 else (*names, self.ground))
        return names == PROBE or zlib.crc32(key.encode()) % 10 == 0


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of several values."""
    return values[int(rng.integers(len(values)))]


def random_scene(rng: np.random.Generator, things: int, held_out: bool = False) -> Scene:
    """A scene of one or two different things, from those that are held out or from the others."""
    while True:
        chosen = tuple(Thing(pick(rng, tuple(COLOURS)), pick(rng, SHAPES)) for _ in range(things))
        relation = pick(rng, RELATIONS) if things == 2 else None
        scene = Scene(chosen, relation, pick(rng, tuple(GROUNDS)), pick(rng, TEXTURES))
        if len(set(chosen)) == things and scene.held_out == held_out:
            return scene


def draw(scene: Scene, rng: np.random.Generator, look: Look = USUAL) -> Array:
    """A picture (128,128,3) in [0,1] of a scene; what the scene leaves open comes from `rng`."""
    picture = background(scene.ground, scene.texture)
    for thing, circle in zip(scene.things, lay_out(scene, rng), strict=True):
        paint(picture, thing, circle, rng, look)
    return picture


def background(ground: str, texture: str) -> Array:
    """Stripes lie across and are 8 pixels high; checks are 16 pixels a side."""
    y, x = np.mgrid[:SIZE, :SIZE]
    patterns = {"plain": np.zeros_like(x), "striped": y // 8 % 2, "checkered": (x // 16 + y // 16) % 2}
    tones = np.asarray(GROUNDS[ground], dtype=np.float32)  # (2,)
    grey = tones[patterns[texture]]  # (128,128)
    return np.repeat(grey[:, :, None], 3, axis=2)  # (128,128,3)


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Circle]:
    """Where each thing is, and how large, with at least 6 pixels between two."""
    if len(scene.things) == 1:
        radius = rng.uniform(22, 36)
        x, y = rng.uniform(radius + 6, SIZE - radius - 6, 2)
        return [Circle(x, y, radius)]
    first, second = rng.uniform(16, 24, 2)  # radii: the first thing is the one nearer to the top or left
    gap = rng.uniform(6, 14)
    spare = SIZE - 2 * (first + second) - gap - 8
    before = 4 + rng.uniform(0.2, 0.8) * spare
    first_along = before + first
    second_along = before + 2 * first + gap + second
    first_across, second_across = SIZE / 2 + rng.uniform(-24, 24) + rng.uniform(-8, 8, 2)
    circles = [Circle(first_along, first_across, first), Circle(second_along, second_across, second)]
    if scene.relation in ("below", "right of"):
        circles.reverse()
    if scene.relation in ("above", "below"):
        circles = [Circle(circle.y, circle.x, circle.radius) for circle in circles]
    return circles


def inside(shape: str, x: Array, y: Array, radius: float) -> Array:
    """How far inside a shape's border each point lies, in pixels; below 0 outside. x and y are from its centre."""
    if shape == "circle":
        return radius - np.hypot(x, y)
    if shape == "square":
        return 0.9 * radius - np.maximum(abs(x), abs(y))
    if shape == "triangle":
        return np.minimum(radius - y, (y + radius - 2 * abs(x)) / np.sqrt(5, dtype=np.float32))
    arm = 0.36 * radius  # half the width of each bar of a cross
    lying = np.minimum(radius - abs(x), arm - abs(y))
    standing = np.minimum(arm - abs(x), radius - abs(y))
    return np.maximum(lying, standing)


def paint(picture: Array, thing: Thing, circle: Circle, rng: np.random.Generator, look: Look) -> None:
    """One shaded thing with a dark outline and a surface of bands, dots or nothing, onto the picture in place."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    dx = columns + 0.5 - np.float32(circle.x)
    dy = rows + 0.5 - np.float32(circle.y)
    depth = inside(thing.shape, dx, dy, circle.radius)
    mark = surface(pick(rng, ("bare", "bands", "dots")), dx, dy)
    light = 1 - 0.2 * (dx + dy) / (2 * circle.radius)  # from the top left
    colour = (1 - look.pale) * np.asarray(COLOURS[thing.colour], dtype=np.float32) + np.float32(look.pale)
    colour = colour * light[:, :, None]  # (3,) -> (128,128,3)
    colour = np.where(mark[:, :, None], 0.65 * colour + 0.35, colour)
    rim = np.clip(depth - OUTLINE + 0.5, 0, 1)[:, :, None]  # 0 in the outline, 1 further in
    colour = colour * (look.outline + (1 - look.outline) * rim)
    cover = np.clip(depth + 0.5, 0, 1)[:, :, None]
    picture[:] = np.clip(cover * colour + (1 - cover) * picture, 0, 1)


def surface(pattern: str, dx: Array, dy: Array) -> NDArray[np.bool_]:
    """Where a thing's surface is lighter, by the distances from its centre."""
    if pattern == "bands":
        return (dx + dy) % 14 < 7
    if pattern == "dots":
        return np.hypot(dx % 12 - 6, dy % 12 - 6) < 3.5
    return np.zeros(dx.shape, dtype=bool)
