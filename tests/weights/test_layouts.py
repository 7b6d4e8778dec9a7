"""Key rules, both ways: against the peers' own key lists and shapes, at small and at official size."""

from typing import Any

import peers
import pytest
import torch
from torch import nn

from sdxl_ref.config import BASE_1_0, CLIP_L, OPENCLIP_BIGG, REFINER_1_0, InputError
from sdxl_ref.weights import layouts
from sdxl_ref.weights.checkpoint import build_empty

MODELS = {
    "small refiner": peers.SMALL_REFINER,
    "small base": peers.SMALL_BASE,
    "refiner": REFINER_1_0,
    "base": BASE_1_0,
}


def rules(part: layouts.Part, network: nn.Module) -> list[layouts.Rule]:
    return layouts.rules(part, network.state_dict(), network.config)


def translated_shapes(part: layouts.Part, network: nn.Module) -> dict[str, tuple[int, ...]]:
    state = layouts.to_other(rules(part, network), network.state_dict())
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def shapes(peer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in peer.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_unet_has_diffusers_keys_and_shapes(name: str) -> None:
    from diffusers import UNet2DConditionModel

    network = build_empty("unet", MODELS[name])
    assert translated_shapes("unet", network) == shapes(peers.unet2d(MODELS[name].unet, UNet2DConditionModel))


@pytest.mark.parametrize("name", ["small refiner", "refiner"])
def test_vae_has_diffusers_keys_and_shapes(name: str) -> None:
    network = build_empty("vae", MODELS[name])
    assert translated_shapes("vae", network) == shapes(peers.vae2d(MODELS[name].vae))


def test_openclip_has_transformers_keys_and_shapes() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    c = OPENCLIP_BIGG
    with torch.device("meta"):
        peer = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=c.width,
                intermediate_size=4 * c.width,
                projection_dim=c.embed_dim,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
            )
        )
    expected = {key: shape for key, shape in shapes(peer).items() if not key.endswith("position_ids")}
    assert translated_shapes("openclip_g", build_empty("text_encoder_2", REFINER_1_0)) == expected


def test_openclip_names_are_open_clips() -> None:
    encoder = peers.small_openclip()
    theirs = set(peers.open_clip_text(encoder).state_dict())
    assert set(encoder.state_dict()) - {"logit_scale"} == theirs - {"attn_mask"}


def test_clip_l_names_are_transformers_with_and_without_the_prefix() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        peer = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=CLIP_L.width,
                intermediate_size=4 * CLIP_L.width,
                num_hidden_layers=CLIP_L.layers,
                num_attention_heads=CLIP_L.heads,
            )
        )
    found = {key for key in peer.state_dict() if not key.endswith("position_ids")}
    ours = build_empty("text_encoder", BASE_1_0)
    prefixed = {key if key.startswith("text_model.") else f"text_model.{key}" for key in found}
    assert prefixed == set(ours.state_dict())
    assert [r.other for r in rules("clip_l", ours)] == [(key,) for key in ours.state_dict()]


@pytest.mark.parametrize(
    ("part", "network"),
    [
        ("unet", peers.small_unet()),
        ("unet", peers.small_unet(peers.SMALL_BASE.unet)),
        ("vae", peers.small_vae()),
        ("openclip_g", peers.small_openclip()),
    ],
    ids=["refiner unet", "base unet", "vae", "openclip_g"],
)
def test_round_trip_is_bit_identical(part: layouts.Part, network: nn.Module) -> None:
    state = network.state_dict()
    back = layouts.to_official(rules(part, network), layouts.to_other(rules(part, network), state))
    assert set(state) - set(back) <= {"logit_scale"}
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key


def test_names_are_one_to_one() -> None:
    for config in MODELS.values():
        names = [name for rule in rules("unet", build_empty("unet", config)) for name in rule.other]
        assert len(names) == len(set(names))


def test_old_diffusers_vae_files_with_convolutions() -> None:
    rule: Any = next(r for r in rules("vae", peers.small_vae()) if r.official == "decoder.mid.attn_1.q.weight")
    weight = peers.small_vae().state_dict()[rule.official]
    assert weight.ndim == 4
    assert rule.split(weight)[0].ndim == 2
    assert torch.equal(rule.join([weight]), weight)


def test_a_key_of_no_module_is_an_error() -> None:
    with pytest.raises(InputError, match="no module of this configuration"):
        layouts.rules("unet", ["input_blocks.99.0.weight"], peers.SMALL_REFINER.unet)


def test_a_missing_tensor_is_named() -> None:
    vae = peers.small_vae()
    other = layouts.to_other(rules("vae", vae), vae.state_dict())
    del other["encoder.conv_in.weight"]
    with pytest.raises(KeyError, match=r"encoder\.conv_in\.weight"):
        layouts.to_official(rules("vae", vae), other)
