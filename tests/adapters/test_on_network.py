"""Adapters on networks: sums that are rounded once and given back bit for bit, wherever the weights are meanwhile."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import TINY, TOWER, UNET, networks, outputs, parts_of, pipeline, put_on, random_file, same, weights
from torch import Tensor

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.active import Adapters
from sdxl_ref.config import InputError
from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import open_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_several_scales_and_removal(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    parts = networks(config)
    first, second = (
        lora.fit(lora.read(random_file(config, tmp_path / f"{seed}.safetensors", seed)), config) for seed in (1, 2)
    )
    plain = outputs(parts, config)
    put_on(parts, (first, 0.5), (first, 0.5))
    halves = outputs(parts, config)
    put_on(parts, (first, 1.0))  # in place of the two
    for a, b in zip(outputs(parts, config), halves, strict=True):
        assert peers.distance(a, b) <= 1e-5
    put_on(parts, (first, 1.0), (second, -0.7))
    assert all(not torch.equal(a, b) for a, b in zip(outputs(parts, config), halves, strict=True))
    put_on(parts, (first, 1.0), (first, -1.0))
    for a, b in zip(outputs(parts, config), plain, strict=True):
        assert peers.distance(a, b) <= 1e-5
    put_on(parts)
    assert all(torch.equal(a, b) for a, b in zip(outputs(parts, config), plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_are_the_rounded_sum_and_come_back_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = TINY[kind]
    pipe = pipeline(config)
    for network in parts_of(pipe).values():
        network.to(dtype)
    before = weights(pipe)
    objects = {part: dict(network.named_parameters()) for part, network in parts_of(pipe).items()}
    places_in_memory = {part: {k: p.data_ptr() for k, p in own.items()} for part, own in objects.items()}
    adapters = Adapters(pipe)
    fitted = []
    for i, name in enumerate("ab"):
        [(_, adapter)] = adapters.load(random_file(config, tmp_path / f"{name}.safetensors", i))
        fitted.append(adapter)
    adapters.set(["a", "b"], [0.7, 0.3])
    expected = {key: tensor.clone() for key, tensor in before.items()}
    for part, key in fitted[0].changes:
        original = before[f"{part}.{key}"].float()
        total = original.clone()
        for adapter, weight in zip(fitted, (0.7, 0.3), strict=True):
            lora.add(total, original, adapter.changes[part, key], weight)
        expected[f"{part}.{key}"] = total.to(dtype)
    assert same(weights(pipe), expected)
    assert not same(expected, before)
    for part, network in parts_of(pipe).items():
        assert all(parameter is objects[part][key] for key, parameter in network.named_parameters())
        assert not any("adapter" in key for key in network.state_dict())
    adapters.set([])
    assert adapters.active == []
    assert same(weights(pipe), before)
    adapters.set("a")
    assert not same(weights(pipe), before)
    adapters.unload()
    assert same(weights(pipe), before)
    for part, network in parts_of(pipe).items():
        assert {k: p.data_ptr() for k, p in network.named_parameters()} == places_in_memory[part]  # the very tensors
    with pytest.raises(InputError, match="no adapter is loaded, found 'a': load one first"):
        adapters.set("a")


def test_a_sum_that_the_dtype_cannot_hold(refiner: Any, file: Callable[..., Path]) -> None:
    refiner.unet.half()
    before = weights(refiner)
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    once = weights(refiner)
    with pytest.raises(InputError, match=r"not finite in torch\.float16: use lower weights, or another dtype"):
        adapters.set("a", 1e7)
    assert same(weights(refiner), once)
    adapters.unload()
    assert same(weights(refiner), before)


def test_a_network_that_changes_its_dtype(refiner: Any, file: Callable[..., Path]) -> None:
    """What is kept is the weight as it was: a detour over bfloat16 costs nothing of it."""
    before = weights(refiner)
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    once = weights(refiner)
    refiner.unet.to(torch.bfloat16)
    adapters.set("a", 0.5)
    key = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    middle = (once[f"unet.{key}"] + before[f"unet.{key}"]) / 2
    assert refiner.unet.get_parameter(key).dtype == torch.bfloat16
    assert torch.allclose(refiner.unet.get_parameter(key), middle.to(torch.bfloat16), atol=1e-2)
    adapters.unload()
    assert torch.equal(refiner.unet.get_parameter(key), before[f"unet.{key}"].to(torch.bfloat16))
    adapters.load(file("a"))
    refiner.unet.to(torch.float64)
    adapters.unload()
    assert refiner.unet.get_parameter(key).dtype == torch.float64
    assert torch.equal(refiner.unet.get_parameter(key), before[f"unet.{key}"].to(torch.bfloat16).double())


def test_a_network_in_float64_is_summed_in_float64(refiner: Any, file: Callable[..., Path]) -> None:
    refiner.unet.double()
    refiner.unet.out[2].weight.data += 1e-12
    before = weights(refiner)
    adapters = Adapters(refiner)
    adapters.load(file("a", layers=("out.2",), parts=UNET))
    adapters.set("a", 1e-12)
    assert not same(weights(refiner), before)
    adapters.unload()
    assert same(weights(refiner), before)


def test_a_network_with_channels_last_keeps_its_strides(refiner: Any, file: Callable[..., Path]) -> None:
    refiner.unet.to(memory_format=torch.channels_last)
    kernel = refiner.unet.get_parameter("middle_block.0.in_layers.2.weight")
    strides = kernel.stride()
    Adapters(refiner).load(file("a"))
    assert kernel.stride() == strides


def read_anew(pipe: Any, state: dict[str, Tensor], drops: bool) -> None:
    """Weights come from their file, as where parts are read when they work; what is before and after is no one's."""
    for part, network in parts_of(pipe).items():
        own = {key.removeprefix(f"{part}."): t.clone() for key, t in state.items() if key.startswith(f"{part}.")}
        network.load_state_dict(own, assign=True)
        network.requires_grad_(False)
        if drops:
            vars(network)["drop_weights"] = lambda network=network: network.to_empty(device="meta")
        adapters = getattr(network, "adapters", None)
        if adapters is not None:
            adapters.put_on_again(network)


def drop(pipe: Any) -> None:
    for network in parts_of(pipe).values():
        network.to_empty(device="meta")


def is_dropped(pipe: Any) -> bool:
    return all(p.is_meta for network in parts_of(pipe).values() for p in network.parameters())


@pytest.mark.parametrize("drops", [False, True])
def test_networks_whose_weights_are_read_when_they_work(refiner: Any, file: Callable[..., Path], drops: bool) -> None:
    plain = weights(refiner)
    adapters = Adapters(pipeline(peers.TINY_REFINER))
    for name in "ab":
        adapters.load(file(name))
    adapters.set(["a", "b"], [0.7, 0.3])
    expected = weights(adapters.pipelines[0])

    adapters = Adapters(refiner)
    drop(refiner)
    for name in "ab":
        adapters.load(file(name))
    adapters.set(["a", "b"], [0.7, 0.3])
    assert is_dropped(refiner)
    for _ in range(2):
        read_anew(refiner, plain, drops)
        assert same(weights(refiner), expected)
        drop(refiner)
    read_anew(refiner, plain, drops)
    kept = [network.adapters.originals for network in parts_of(refiner).values()]
    assert all(not own if drops else own for own in kept)
    adapters.set(["a", "b"], [0.7, 0.3])  # as it is
    assert same(weights(refiner), expected)
    adapters.set("b")
    if drops:  # to be read anew, because nothing was kept of what they were
        assert is_dropped(refiner)
        read_anew(refiner, plain, drops)
    adapters.set(["a", "b"], [0.7, 0.3])
    if drops:
        read_anew(refiner, plain, drops)
    assert same(weights(refiner), expected)
    adapters.unload()
    if drops:
        read_anew(refiner, plain, drops)
    assert same(weights(refiner), plain)
    adapters.load(file("a"))
    drop(refiner)
    adapters.unload()  # forgets
    assert not any(network.adapters.originals for network in parts_of(refiner).values())
    read_anew(refiner, plain, drops)
    assert same(weights(refiner), plain)


def test_networks_that_share_one_place(tiny_refiner_file: Path, file: Callable[..., Path]) -> None:
    """Read from their file in turn, as with `low_memory`: the same outputs as of networks that stay."""
    checkpoint = open_checkpoint(tiny_refiner_file)
    parts = ("unet", "text_encoder_2")
    offload = Offload("cpu")
    turns = pipeline(checkpoint.config, **{part: offload.read(checkpoint, part, torch.float32) for part in parts})
    stays = pipeline(checkpoint.config, **{part: checkpoint.load(part) for part in parts})

    def agree() -> list[Tensor]:
        found, expected = (outputs(parts_of(pipe), checkpoint.config) for pipe in (turns, stays))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        return found

    plain = agree()
    steps: list[Callable[[Adapters], Any]] = [
        lambda adapters: adapters.load(file("a")),
        lambda adapters: adapters.load(file("b", parts=UNET)),
        lambda adapters: adapters.set(["a", "b"], [0.5, -0.4]),
        lambda adapters: adapters.set("a"),
    ]
    for step in steps:
        for pipe in (turns, stays):
            step(Adapters(pipe))
        assert peers.distance(agree()[0], plain[0]) > 1e-2
        agree()
    Adapters(turns).unload()
    Adapters(stays).unload()
    assert torch.equal(agree()[0], plain[0])
    assert not any(network.adapters.originals for network in parts_of(turns).values())


def test_weights_that_are_read_anew_are_the_ones_that_come_back(refiner: Any, file: Callable[..., Path]) -> None:
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    others = {key: tensor + 1 for key, tensor in weights(refiner).items()}
    read_anew(refiner, others, drops=False)
    assert not same(weights(refiner), others)
    adapters.unload()
    assert same(weights(refiner), others)


def test_a_compiled_network(refiner: Any, file: Callable[..., Path]) -> None:
    """What `torch.compile` wraps has the adapters, before and after, and the wrapper runs with the changed weights."""
    tokens = torch.full((1, 77), 49407)
    tower = refiner.text_encoder_2
    plain = tower(tokens)[0]
    adapters = Adapters(refiner)
    adapters.load(file("a", parts=TOWER))
    once = tower(tokens)[0]
    assert peers.distance(plain, once) > 1e-2
    refiner.text_encoder_2 = torch.compile(tower, backend="eager")
    assert torch.equal(refiner.text_encoder_2(tokens)[0], once)
    assert adapters.active == ["a"]
    adapters.set("a", 0.0)
    assert torch.equal(refiner.text_encoder_2(tokens)[0], plain)
    adapters.set("a")
    assert torch.equal(refiner.text_encoder_2(tokens)[0], once)
    refiner.text_encoder_2 = tower
    adapters.unload()
    assert torch.equal(tower(tokens)[0], plain)


def test_a_copy_of_a_network_has_adapters_of_its_own(refiner: Any, file: Callable[..., Path]) -> None:
    plain = weights(refiner)
    Adapters(refiner).load(file("a"))
    once = weights(refiner)
    other = copy.deepcopy(refiner)
    Adapters(other).unload()
    assert same(weights(other), plain)
    assert same(weights(refiner), once)
