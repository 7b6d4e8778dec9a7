"""A tower with vectors in the place of placeholders, and with an earlier hidden state: the hooks themselves."""

from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from sdxl_ref.text.inversion import FIRST
from sdxl_ref.text.tokenizer import END, START
from sdxl_ref.text.towers import run

VECTORS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def tokens(*ids: int) -> Tensor:
    return torch.tensor([[START, *ids, END, *[0] * (75 - len(ids))]])


def embedded(tower: nn.Module, rows: Tensor) -> Tensor:
    """What the token embedding gives while the tower runs."""
    seen: list[Tensor] = []
    with_hooks: Any = tower.get_submodule("transformer.resblocks.0")
    handle = with_hooks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run("clip_g", tower, rows, VECTORS, 0)
    handle.remove()
    return seen[0] - tower.get_parameter("positional_embedding")


def test_each_placeholder_is_its_own_vector_in_every_row() -> None:
    tower = peers.small_openclip()
    rows = torch.cat([tokens(FIRST + 2, 320, FIRST), tokens(320, FIRST + 1)])
    before = embedded(tower, rows)
    table = tower.token_embedding.weight
    assert torch.allclose(before[0, 1:4], torch.stack([VECTORS[2], table[320], VECTORS[0]]), atol=1e-6)
    assert torch.allclose(before[1, 1:3], torch.stack([table[320], VECTORS[1]]), atol=1e-6)
    assert torch.allclose(before[:, 0], table[START].expand(2, -1), atol=1e-6)


def test_the_pooled_vector_is_at_the_end_of_the_text_not_at_a_placeholder() -> None:
    tower = peers.small_openclip()
    _, alone = run("clip_g", tower, tokens(FIRST), VECTORS, 0)
    _, before_a_word = run("clip_g", tower, tokens(FIRST, 320), VECTORS, 0)
    assert alone is not None
    assert before_a_word is not None
    assert peers.distance(alone, before_a_word) > 0.01


def test_without_either_the_tower_runs_as_it_is() -> None:
    tower = peers.small_openclip()
    calls: list[Any] = []
    tower.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    hidden, pooled = run("clip_g", tower, tokens(320), None, 0)
    assert torch.equal(hidden, tower(tokens(320))[0])
    assert torch.equal(calls[0], tokens(320))
    assert pooled is not None


def test_clip_l_has_no_pooled_vector() -> None:
    assert run("clip_l", peers.small_clip(), tokens(320), None, 1)[1] is None


def test_hooks_are_gone_after_an_error() -> None:
    tower = peers.small_openclip()

    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("stopped")

    tower.ln_final.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run("clip_g", tower, tokens(FIRST), VECTORS, 1)
    assert not any(module._forward_hooks for module in tower.modules())
