"""Where layers act: every matrix of the networks once, in both layouts' names, and blocks of stacked ones."""

import peers
import pytest
import torch

from sdxl_ref.adapters.places import Place, adapted_parts, matrices, module_of, places
from sdxl_ref.config import BASE_1_0, REFINER_1_0, ModelConfig
from sdxl_ref.weights.checkpoint import build_empty, prefixes
from sdxl_ref.weights.layouts import part_rules

MODELS = {
    "small base": peers.SMALL_BASE,
    "small refiner": peers.SMALL_REFINER,
    "base": BASE_1_0,
    "refiner": REFINER_1_0,
}


def bigg(config: ModelConfig) -> dict[str, Place]:
    return places("text_encoder_2", part_rules("text_encoder_2", config)[1])


def test_the_parts_that_adapters_act_on() -> None:
    assert list(adapted_parts(peers.SMALL_BASE)) == ["unet", "text_encoder", "text_encoder_2"]
    assert list(adapted_parts(peers.SMALL_REFINER)) == ["unet", "text_encoder_2"]
    for config in (peers.SMALL_BASE, peers.SMALL_REFINER):
        assert adapted_parts(config).items() <= prefixes(config).items()


def test_a_layer_has_one_place_under_its_names_in_both_layouts() -> None:
    unet = places("unet", part_rules("unet", peers.SMALL_REFINER)[1])
    official, diffusers = "middle_block.0.in_layers.2", "mid_block.resnets.0.conv1"
    assert unet[official] == unet[diffusers] == Place("unet", f"{official}.weight")
    assert unet["out.0"] == unet["conv_norm_out"]  # one-dimensional ones too


def test_q_k_and_v_are_blocks_of_the_stacked_matrix() -> None:
    names = bigg(peers.SMALL_REFINER)
    stacked = names["transformer.resblocks.1.attn.in_proj"]
    weight = torch.arange(3 * 64 * 64.0).reshape(3 * 64, 64)
    assert stacked.count == 1
    assert torch.equal(stacked.block(weight), weight)
    for i, letter in enumerate("qkv"):
        place = names[f"text_model.encoder.layers.1.self_attn.{letter}_proj"]
        assert (place.key, place.index, place.count) == (stacked.key, i, 3)
        assert torch.equal(place.block(weight), weight[64 * i : 64 * (i + 1)])
        assert place.block(weight).data_ptr() == weight[64 * i].data_ptr()  # a view: changing it changes the weight


def test_the_projection_is_held_transposed() -> None:
    place = bigg(peers.SMALL_REFINER)["text_projection"]
    weight = torch.randn(64, 48)
    assert place.transposed
    assert torch.equal(place.block(weight), weight.T)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_and_kernel_stands_there_once(name: str) -> None:
    config = MODELS[name]
    keys = matrices(config)
    blocks: dict[str, list[Place]] = {}
    for place, key in keys.items():
        assert key == prefixes(config)[place.part] + place.key
        blocks.setdefault(key, []).append(place)
    expected = set()
    for part, prefix in adapted_parts(config).items():
        for key, parameter in build_empty(part, config).named_parameters():
            if parameter.ndim >= 2 and "embedding" not in key:
                expected.add(prefix + key)
    assert blocks.keys() == expected
    for key, own in blocks.items():
        stacked = key.endswith("in_proj_weight")
        assert [(place.index, place.count) for place in own] == ([(0, 3), (1, 3), (2, 3)] if stacked else [(0, 1)])


def test_the_layer_of_a_weight() -> None:
    assert module_of("a.b.weight") == "a.b"
    assert module_of("attn.in_proj_weight") == "attn.in_proj"
    assert module_of("text_projection") == "text_projection"
