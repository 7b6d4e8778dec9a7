"""`encode_prompt` against diffusers' `encode_prompt`, live on the same weights: four tensors, in the same order."""

from typing import Any

import checks
import pairs
import pytest
import torch

from sdxl_ref.config import InputError
from sdxl_ref.text.conditioning import PromptEmbeds

WIDTHS = {"base": 32 + 64, "refiner": 64}  # of the context: both encoders', or the second one's
POOLED = 48
BASE_CASES: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": "a cup of coffee"},
    "an empty prompt": {"prompt": ""},
    "a negative prompt": {"prompt": "a cup", "negative_prompt": "blurry, grey"},
    "an empty negative prompt": {"prompt": "a cup", "negative_prompt": ""},
    "second prompts": {
        "prompt": "a cup",
        "prompt_2": "a red cat",
        "negative_prompt": "blurry",
        "negative_prompt_2": "grey",
    },
    "several prompts": {"prompt": ["a cup", "a dog"], "negative_prompt": ["x", "y"]},
    "several pictures": {"prompt": ["a cup", "a dog"], "negative_prompt": ["x", "y"], "num_images_per_prompt": 3},
    "no guidance": {"prompt": "a cup", "do_classifier_free_guidance": False},
}
REFINER_CASES = {name: case for name, case in BASE_CASES.items() if "prompt_2" not in case}
CASES = [("base", name) for name in BASE_CASES] + [("refiner", name) for name in REFINER_CASES]


def ours(kind: str, **arguments: Any) -> PromptEmbeds:
    pipe: Any = pairs.base() if kind == "base" else pairs.refiner()
    with torch.no_grad():
        embeds: PromptEmbeds = pipe.encode_prompt(**arguments)
    return embeds


def theirs(kind: str, **arguments: Any) -> Any:
    pipe = pairs.diffusers_base() if kind == "base" else pairs.diffusers_refiner()
    usual = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        return pipe.encode_prompt(**usual | arguments)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_the_four_tensors_are_those_of_diffusers(kind: str, case: str) -> None:
    arguments = BASE_CASES[case]
    found = ours(kind, **arguments)
    expected = theirs(kind, **arguments)
    assert len(found) == len(expected) == 4
    for name, tensor, peer in zip(PromptEmbeds._fields, found, expected, strict=True):
        assert (tensor is None) == (peer is None), name
        if tensor is not None and peer is not None:
            assert tensor.shape == peer.shape, name
            assert torch.equal(tensor == 0, peer == 0), name
            if peer.any():
                checks.close(tensor, peer, checks.FLOAT32, name)


@pytest.mark.parametrize("kind", WIDTHS)
def test_shapes_and_sides(kind: str) -> None:
    """Of 2 prompts for 3 pictures each: context and pooled vector, positive and negative in turn."""
    context, negative_context, pooled, negative_pooled = ours(
        kind, prompt=["a", "b"], negative_prompt="c", num_images_per_prompt=3
    )
    assert negative_context is not None
    assert negative_pooled is not None
    assert context.shape == negative_context.shape == (6, 77, WIDTHS[kind])
    assert pooled.shape == negative_pooled.shape == (6, POOLED)
    assert torch.equal(context[0], context[2])
    assert not torch.equal(context[2], context[3])  # the second prompt's
    assert torch.equal(negative_pooled[0], negative_pooled[5])  # one negative prompt serves all


def test_without_a_negative_prompt_the_negative_side_is_zeros_on_a_base_and_the_empty_prompt_on_a_refiner() -> None:
    base = ours("base", prompt="a cup")
    assert base.negative_prompt_embeds is not None
    assert base.negative_pooled_prompt_embeds is not None
    assert not base.negative_prompt_embeds.any()
    assert not base.negative_pooled_prompt_embeds.any()
    refiner = ours("refiner", prompt="a cup")
    empty = ours("refiner", prompt="", do_classifier_free_guidance=False)
    assert refiner.negative_prompt_embeds is not None
    torch.testing.assert_close(refiner.negative_prompt_embeds, empty.prompt_embeds)


@pytest.mark.parametrize("prompts", [{"prompt": []}, {"prompt": ["a"], "negative_prompt": ["x", "y"]}], ids=str)
def test_numbers_of_prompts_that_do_not_go_together(prompts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected one prompt, or one for each image, found"):
        ours("base", **prompts)
