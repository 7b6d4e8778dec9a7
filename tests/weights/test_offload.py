"""`Offload` itself: one network is there at a time, by hooks on the networks, which stay what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import open_checkpoint


def is_there(network: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in network.parameters())


@pytest.fixture
def pair(files: dict[str, Path]) -> tuple[Offload, Any, Any]:
    """A refiner's autoencoder and its text encoder, to be read when they work."""
    offload = Offload("cpu")
    checkpoint = open_checkpoint(files["refiner"])
    vae = offload.read(checkpoint, "vae", torch.float32)
    return offload, vae, offload.read(checkpoint, "text_encoder_2", torch.float32)


LATENTS = torch.zeros(1, 4, 2, 2)
TOKENS = torch.zeros(1, 77, dtype=torch.int64)


def test_what_works_arrives_and_what_worked_before_leaves(pair: tuple[Offload, Any, Any]) -> None:
    offload, vae, text = pair
    assert not is_there(vae)
    vae.decode(LATENTS)
    assert (is_there(vae), is_there(text)) == (True, False)
    vae.decode(LATENTS)  # it is there: nothing happens
    text(TOKENS)
    assert (is_there(vae), is_there(text)) == (False, True)
    vae.encode(torch.zeros(1, 3, 8, 8))  # an autoencoder has two doors
    assert (is_there(vae), is_there(text)) == (True, False)
    assert offload.arrivals == ["refiner vae", "refiner text_encoder_2", "refiner vae"]


def test_what_is_read_is_what_is_in_the_file(pair: tuple[Offload, Any, Any], files: dict[str, Path]) -> None:
    _, vae, _ = pair
    loaded: Any = open_checkpoint(files["refiner"]).load("vae")
    assert torch.equal(vae.decode(LATENTS), loaded.decode(LATENTS))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(vae.state_dict()[key], tensor), key
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_networks_dtype_is_that_in_which_it_is_read(pair: tuple[Offload, Any, Any]) -> None:
    _, vae, _ = pair
    vae.to(torch.bfloat16)
    assert vae.decode(LATENTS.bfloat16()).dtype == torch.bfloat16


def test_dropped_weights_are_read_again_when_it_works(pair: tuple[Offload, Any, Any]) -> None:
    offload, vae, text = pair
    before = vae.decode(LATENTS)
    text.drop_weights()  # it has none: nothing happens
    assert is_there(vae)
    vae.drop_weights()
    assert not is_there(vae)
    assert torch.equal(vae.decode(LATENTS), before)
    assert offload.arrivals == ["refiner vae", "refiner vae"]


def test_moving_networks_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU here; what is asked of the networks tells who is where."""
    moves: list[str] = []
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    offload = Offload("cpu")
    for name, network in {"first": first, "second": second}.items():

        def to(device: Any, name: str = name) -> None:
            moves.append(f"{name} to {device}")

        monkeypatch.setattr(network, "to", to)
        offload.move(name, network)
    moves.clear()
    x = torch.zeros(1, 2)
    for network in (first, first, second, first):
        network(x)
    assert offload.arrivals == ["first", "second", "first"]
    assert moves == [*["first to cpu"] * 2, *["second to cpu"] * 2, "first to cpu"]


def test_a_users_hook_runs_after_the_arrival(pair: tuple[Offload, Any, Any]) -> None:
    _, _, text = pair
    seen: list[tuple[bool, Tensor]] = []
    text.register_forward_pre_hook(lambda module, args: seen.append((is_there(module), args[0])))
    text(TOKENS)
    assert [there for there, _ in seen] == [True]
    assert seen[0][1] is TOKENS


def test_it_arrives_before_hooks_that_were_there_already() -> None:
    network = nn.Linear(2, 2)
    offload = Offload("cpu")
    seen: list[list[str]] = []
    network.register_forward_pre_hook(lambda module, args: seen.append(list(offload.arrivals)))
    offload.move("network", network)
    network(torch.zeros(1, 2))
    assert seen == [["network"]]
