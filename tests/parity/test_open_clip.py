"""open_clip's own text tower, live on our weights: the lab sees its modules by the official names, and agrees."""

import peers
import pytest
import torch

from sdxl_ref import parity
from sdxl_ref.networks.layers import QuickGELU
from sdxl_ref.parity.peers import openclip_tower
from sdxl_ref.text.tokenizer import tokenize

TOKENS = tokenize(["a cup of coffee on a wooden table", ""], pad="zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_agrees(dtype: torch.dtype) -> None:
    encoder = peers.small_openclip(peers.SMALL_REFINER.text_encoders[-1])
    report = parity.compare(encoder, openclip_tower(encoder).to(dtype), (TOKENS,))
    assert report.culprits == []
    known = {point.name for point in report.points if point.own is not None}
    assert {"text_encoder_2/token_embedding", "text_encoder_2/ln_final", "text_encoder_2"} <= known
    assert {f"text_encoder_2/transformer.resblocks.{i}.mlp.c_fc" for i in range(3)} <= known


def test_a_fault_is_named_and_explained() -> None:
    encoder = peers.small_openclip(peers.SMALL_REFINER.text_encoders[-1])
    tower = openclip_tower(encoder)
    tower.transformer.resblocks[1].mlp.gelu = QuickGELU()
    report = parity.compare(encoder, tower, (TOKENS,))
    name = "text_encoder_2/transformer.resblocks.1.mlp.gelu"
    assert report.culprits == [name]
    assert "quick gelu" in report.causes[name]
