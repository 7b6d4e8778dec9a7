"""What the text towers of the recipe learn to tell."""

import torch

from sdxl_ref.pocket.scenes import COLOURS, SHAPES, Scene, Thing
from sdxl_ref.pocket.towers import FACTS, Reader


def test_what_the_towers_learn_is_of_the_picture_not_of_its_wording() -> None:
    """Two captions of one picture have the same answers; the words of one are told apart by their places."""
    one = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "plain")
    same = Scene((Thing("blue", "square"), Thing("red", "circle")), "below", "white", "plain")
    other = Scene((Thing("red", "circle"), Thing("blue", "square")), "below", "white", "plain")
    assert Reader.facts(one) == Reader.facts(same) != Reader.facts(other)
    single = Reader.facts(Scene((Thing("red", "circle"),), None, "black", "striped"))
    logits = Reader(8)(torch.randn(2, 8))
    assert [each.shape[1] for each in logits] == list(FACTS.values())
    for facts in (Reader.facts(one), single):
        assert all(0 <= fact < n for fact, n in zip(facts, FACTS.values(), strict=True))
    assert single[3:5] == [len(COLOURS), len(SHAPES)]
