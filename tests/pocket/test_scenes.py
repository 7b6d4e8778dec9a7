"""Scenes and the judge that reads them back."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.scenes import (
    COLOURS,
    GROUNDS,
    OPPOSITE,
    PASTEL,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    background,
    draw,
    random_scene,
)

COUNT = 1000


def test_the_judge_reads_another_look_as_well() -> None:
    rng = np.random.default_rng(7)
    chosen = [random_scene(rng, 1 + i % 2) for i in range(300)]
    drawn = [(scene, draw(scene, np.random.default_rng(i), PASTEL)) for i, scene in enumerate(chosen)]
    right = sum(judge(picture, scene).all_right for scene, picture in drawn)
    print(f"all right: {right} of {len(chosen)}")
    assert right >= 0.98 * len(chosen)
    usual = draw(chosen[0], np.random.default_rng(0))
    assert np.abs(usual - drawn[0][1]).max() > 0.3


def scenes(count: int, seed: int) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    chosen = [random_scene(rng, 1 + i % 2, held_out=i % 5 == 0) for i in range(count)]
    return [(scene, draw(scene, rng)) for scene in chosen]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, np.ndarray]]:
    return scenes(COUNT, seed=100)


def wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    """One thing that the caption says, changed."""
    changes = ["colour", "shape", "ground", "texture", *["relation", "order"] * (len(scene.things) == 2)]
    change, which = rng.choice(changes), int(rng.integers(len(scene.things)))

    def other(values: object, than: str) -> str:
        return str(rng.choice([v for v in values if v != than]))  # type: ignore[attr-defined]

    if change in ("ground", "texture"):
        values = GROUNDS if change == "ground" else TEXTURES
        return replace(scene, **{change: other(values, getattr(scene, change))})
    if change == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation or ""])
    if change == "order":
        return replace(scene, things=scene.things[::-1])
    thing = scene.things[which]
    thing = replace(thing, **{change: other(COLOURS if change == "colour" else SHAPES, getattr(thing, change))})
    return replace(scene, things=tuple(thing if i == which else each for i, each in enumerate(scene.things)))


def test_the_judge_is_right_on_drawn_scenes(drawn: list[tuple[Scene, np.ndarray]]) -> None:
    right = sum(judge(picture, scene).all_right for scene, picture in drawn)
    print(f"all right: {right} of {COUNT}")
    assert right >= 0.99 * COUNT


def test_the_judge_refuses_wrong_captions(drawn: list[tuple[Scene, np.ndarray]]) -> None:
    """One attribute changed at a time, the order of the things included."""
    rng = np.random.default_rng(0)
    passed = sum(judge(picture, wrong(scene, rng)).all_right for scene, picture in drawn)
    print(f"wrong captions passed: {passed} of {COUNT}")
    assert passed <= 0.05 * COUNT


def test_each_mark_tells_of_its_own_attribute() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "striped")
    picture = draw(scene, np.random.default_rng(0))
    assert judge(picture, scene).all_right
    for attribute, other in {
        "colours": replace(scene, things=(Thing("pink", "circle"), scene.things[1])),
        "shapes": replace(scene, things=(Thing("red", "cross"), scene.things[1])),
        "relation": replace(scene, relation="left of"),
        "ground": replace(scene, ground="gray"),
        "texture": replace(scene, texture="plain"),
    }.items():
        marks = vars(judge(picture, other))
        assert [name for name, right in marks.items() if not right] == [attribute]


@pytest.mark.parametrize("fault", ["black", "noise", "one missing"])
def test_what_is_no_such_scene_gets_no_mark_for_its_things(fault: str) -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "plain")
    rng = np.random.default_rng(0)
    pictures = {"black": np.zeros((128, 128, 3), np.float32), "noise": rng.random((128, 128, 3), np.float32)}
    alone = replace(scene, things=scene.things[:1], relation=None)
    marks = judge(pictures.get(fault, draw(alone, rng)), scene)
    assert not any((marks.things, marks.colours, marks.shapes, marks.relation))


@pytest.mark.parametrize(("size", "right"), [((40, 40), True), ((36, 46), True), ((4, 50), False), ((50, 20), False)])
def test_a_shape_is_as_wide_as_it_is_high(size: tuple[int, int], right: bool) -> None:
    picture = background("white", "plain")
    picture[40 : 40 + size[0], 40 : 40 + size[1]] = COLOURS["red"]
    scene = Scene((Thing("red", "square"),), None, "white", "plain")
    assert judge(picture, scene).shapes == right


@pytest.mark.parametrize("cells", [1, 2])
def test_upright_stripes_have_no_name(cells: int) -> None:
    """In no scene are there any: they are neither plain nor checkered."""
    picture = background("white", "plain")
    picture[:, np.arange(128) // (8 * cells) % 2 == 1] = GROUNDS["white"][1]
    picture[40:80, 40:80] = COLOURS["red"]
    for texture in TEXTURES:
        assert not judge(picture, Scene((Thing("red", "square"),), None, "white", texture)).texture


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
