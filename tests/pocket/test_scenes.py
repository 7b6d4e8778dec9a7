"""Scenes: how they are drawn, what is held out of training, their captions."""

from dataclasses import replace
from itertools import product

import numpy as np

from sdxl_ref.pocket.scenes import COLOURS, GROUNDS, SHAPES, Array, Scene, Thing, draw, random_scene


def scenes(count: int, seed: int) -> list[tuple[Scene, Array]]:
    rng = np.random.default_rng(seed)
    chosen = [random_scene(rng, 1 + i % 2, held_out=i % 5 == 0) for i in range(count)]
    return [(scene, draw(scene, rng)) for scene in chosen]


def test_drawing_is_deterministic_and_in_range() -> None:
    for (scene, first), (again, second) in zip(scenes(20, seed=3), scenes(20, seed=3), strict=True):
        assert scene == again
        assert np.array_equal(first, second)
        assert first.shape == (128, 128, 3)
        assert first.min() >= 0
        assert first.max() <= 1


def test_what_is_held_out_is_as_much_as_is_said_and_the_probe_is() -> None:
    """31 of 276 pairs, each in both orders; 13 of 72 single things with a ground."""
    things = [Thing(*pair) for pair in product(COLOURS, SHAPES)]
    pairs = [Scene((a, b), "above", "white", "plain") for a in things for b in things if a != b]
    assert (sum(scene.held_out for scene in pairs), len(pairs)) == (2 * 31, 2 * 276)
    assert Scene((Thing("red", "square"), Thing("blue", "circle")), "above", "white", "plain").held_out
    assert all(replace(s, things=s.things[::-1], relation="below").held_out == s.held_out for s in pairs)
    singles = [Scene((thing,), None, ground, "plain") for thing in things for ground in GROUNDS]
    assert (sum(scene.held_out for scene in singles), len(singles)) == (13, 72)


def test_captions() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "left of", "green", "plain")
    assert scene.caption == "a red circle left of a blue square on a green plain background"
