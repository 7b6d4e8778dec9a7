"""The judge reads back what was drawn, and nothing that was not."""

from dataclasses import replace
from functools import lru_cache

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
    Array,
    Scene,
    Thing,
    background,
    draw,
    random_scene,
)

READ = 0.99  # the least share of drawn scenes that the judge has to read all right
READ_PASTEL = 0.98
PASSED = 0.05  # the largest share of wrong captions that may pass
FEW_AND_MANY = [200, pytest.param(1000, marks=pytest.mark.sweep)]


@lru_cache(maxsize=1)
def drawn_scenes(count: int) -> list[tuple[Scene, Array]]:
    """With one thing and two by turns, every fifth held out of training."""
    rng = np.random.default_rng(100)
    scenes = [random_scene(rng, 1 + i % 2, held_out=i % 5 == 0) for i in range(count)]
    return [(scene, draw(scene, rng)) for scene in scenes]


@pytest.mark.parametrize("count", FEW_AND_MANY)
def test_the_judge_is_right_on_drawn_scenes(count: int) -> None:
    right = [judge(picture, scene).all_right for scene, picture in drawn_scenes(count)].count(True)
    print(f"all right: {right} of {count}")
    assert right >= READ * count


@pytest.mark.parametrize("count", FEW_AND_MANY)
def test_the_judge_refuses_wrong_captions(count: int) -> None:
    """One attribute changed at a time, the order of the things included."""
    rng = np.random.default_rng(0)
    marks = [judge(picture, wrong(scene, rng)) for scene, picture in drawn_scenes(count)]
    passed = [mark.all_right for mark in marks].count(True)
    print(f"wrong captions passed: {passed} of {count}")
    assert passed <= PASSED * count


def wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    """One thing that the caption says, changed."""
    changes = ["colour", "shape", "ground", "texture"]
    if len(scene.things) == 2:
        changes += ["relation", "order"]
    change = rng.choice(changes)
    index = int(rng.integers(len(scene.things)))

    def other(values: object, than: str) -> str:
        return str(rng.choice([value for value in values if value != than]))  # type: ignore[attr-defined]

    if change in ("ground", "texture"):
        values = GROUNDS if change == "ground" else TEXTURES
        return replace(scene, **{change: other(values, getattr(scene, change))})
    if change == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation or ""])
    if change == "order":
        return replace(scene, things=scene.things[::-1])
    things = list(scene.things)
    values = COLOURS if change == "colour" else SHAPES
    things[index] = replace(things[index], **{change: other(values, getattr(things[index], change))})
    return replace(scene, things=tuple(things))


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.sweep)])
def test_the_judge_reads_another_look_as_well(count: int) -> None:
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(count)]
    pictures = [draw(scene, np.random.default_rng(i), PASTEL) for i, scene in enumerate(scenes)]
    marks = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    right = [mark.all_right for mark in marks].count(True)
    print(f"all right: {right} of {count}")
    assert right >= READ_PASTEL * count
    usual = draw(scenes[0], np.random.default_rng(0))
    assert np.abs(usual - pictures[0]).max() > 0.3  # another look indeed


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
