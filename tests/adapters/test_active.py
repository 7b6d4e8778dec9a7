"""Adapters on pipelines: against diffusers with PEFT, by name, all or nothing, and on networks that are shared."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import TINY, TOWER, UNET, pipeline, random_file, same, unet_inputs, weights
from cases import diagonal
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_ref.adapters import lora, on_network, writing
from sdxl_ref.adapters.active import Adapters
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.config import InputError, ModelConfig


def as_peft(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    return writing.tensors(lora.load(file, config), config, "peft")


@pytest.mark.parametrize(("kind", "numbers"), diagonal([*TINY], [(0.7, 0.3), (1.0, 0.0), (-0.5, 2.0)]))
def test_two_weighted_adapters_give_what_diffusers_gives(
    kind: str, numbers: tuple[float, float], tmp_path: Path
) -> None:
    config = TINY[kind]
    pipe = pipeline(config)
    peer = peers.diffusers_unet(pipe.unet)
    adapters = Adapters(pipe)
    inputs = unet_inputs(config)
    plain = pipe.unet(*inputs)
    for i, name in enumerate("ab"):
        path = random_file(config, tmp_path / f"{name}.safetensors", i, layers=("to_", "in_layers.2"), parts=UNET)
        adapters.load(path)
        peer.load_lora_adapter(as_peft(path, config), adapter_name=name, prefix="unet")
    adapters.set(["a", "b"], numbers)
    peer.set_adapters(["a", "b"], list(numbers))
    expected = peers.call_diffusers_unet(peer, *inputs).detach()
    distance = peers.distance(pipe.unet(*inputs), expected)
    print(f"{kind} at {numbers}: {distance:.1e}, without adapters {peers.distance(plain, expected):.1e}")
    assert distance <= 1e-5
    assert peers.distance(plain, expected) > 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what the first adapter has and the second has not
def test_what_is_active_is_what_diffusers_says(refiner: Any, file: Callable[..., Path]) -> None:
    """On a UNet, call by call: the newest alone after loading, what was named last after setting, in that order."""
    peer = peers.diffusers_unet(refiner.unet)
    adapters = Adapters(refiner)
    inputs = unet_inputs(peers.TINY_REFINER)

    def agree(expected: list[str]) -> None:
        theirs = peer.active_adapters()
        theirs = [theirs] if isinstance(theirs, str) else theirs
        assert adapters.active == theirs == expected
        output = peers.call_diffusers_unet(peer, *inputs).detach()
        assert peers.distance(refiner.unet(*inputs), output) <= 1e-5

    for name in "abc":
        path = file(name, parts=UNET)
        adapters.load(path, name)
        peer.load_lora_adapter(as_peft(path, peers.TINY_REFINER), adapter_name=name, prefix="unet")
        agree([name])
    calls: list[tuple[Any, ...]] = [
        ("a",),
        (["b", "a"],),
        (["c", "b"], 0.4),
        (["a", "c", "b"], [0.5, None, -0.2]),
        (["b"], 0.0),
        (["a"], [2]),
    ]
    for names, *numbers in calls:
        adapters.set(names, *numbers)
        peer.set_adapters(names, *numbers)
        agree([names] if isinstance(names, str) else names)
    with pytest.raises(InputError, match="expected one weight for each of 2 adapters, found 1"):
        adapters.set(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="Length of adapter names 2 is not equal to the length of their weights 1"):
        peer.set_adapters(["a", "b"], [1.0])


def test_the_same_name_again_replaces(refiner: Any, file: Callable[..., Path]) -> None:
    adapters = Adapters(refiner)
    before = weights(refiner)
    adapters.load(file("a"), "x")
    once = weights(refiner)
    for _ in range(2):
        adapters.load(file("a"), "x")
        assert same(weights(refiner), once)
        assert adapters.active == adapters.loaded == ["x"]
    adapters.load(file("b"), "x")  # another file
    other = weights(refiner)
    assert not same(other, once)
    adapters.load(file("a", parts=UNET), "x")  # which has nothing for the tower
    assert all(torch.equal(other, before[key]) for key, other in weights(refiner).items() if "encoder" in key)
    adapters.unload()
    assert same(weights(refiner), before)


def test_names_of_files(refiner: Any, tmp_path: Path) -> None:
    adapters = Adapters(refiner)
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        random_file(peers.TINY_REFINER, tmp_path / folder / "style.safetensors", len(folder))
    for folder, expected in (("one", "style"), ("two", "style_2"), ("three", "style_3"), ("two", "style_2")):
        adapters.load(str(tmp_path / folder / "style.safetensors"))
        assert adapters.active == [expected]
    assert sorted(adapters.loaded) == ["style", "style_2", "style_3"]
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "one" / "style.safetensors")
    adapters.load(tmp_path / "link.safetensors")
    assert adapters.active == ["link"]


def test_no_order_of_calls_makes_a_difference(file: Callable[..., Path]) -> None:
    results = []
    for order in ("abc", "cab", "bca"):
        pipe = pipeline(peers.TINY_REFINER)
        pipe.unet.to(torch.bfloat16)
        adapters = Adapters(pipe)
        for name in order:
            adapters.load(file(name))
        adapters.set("b", 3.0)
        numbers = {"a": 0.3, "b": 0.9, "c": -0.4}
        adapters.set(list(order), [numbers[name] for name in order])
        assert adapters.active == list(order)
        results.append(weights(pipe))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_weight_0(refiner: Any, file: Callable[..., Path]) -> None:
    before = weights(refiner)
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    adapters.set("a", 0.0)
    assert adapters.active == ["a"]
    assert same(weights(refiner), before)


def test_two_pipelines_that_share_a_tower(tmp_path: Path) -> None:
    """The tower has one state: nothing adds up, and whoever unloads gives its own weights back."""
    base = pipeline(peers.SMALL_BASE)
    refiner = pipeline(peers.SMALL_REFINER, text_encoder_2=base.text_encoder_2)
    before = weights(base), weights(refiner)
    path = random_file(peers.SMALL_REFINER, tmp_path / "tower.safetensors", parts=TOWER)
    save_file(
        {k.replace("embedders.0", "embedders.1"): v for k, v in load_file(path).items()}, tmp_path / "x.safetensors"
    )
    (tmp_path / "base.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    of_base, of_refiner = Adapters(base), Adapters(refiner)
    of_base.load(tmp_path / "base.safetensors", "x")
    once = weights(base)
    of_refiner.load(path, "x")
    assert same(weights(base), once)
    assert of_base.active == of_refiner.active == ["x"]
    of_refiner.set("x", 0.5)
    half = weights(base)
    assert not same(half, once)
    of_base.set("x", 1.0)
    assert same(weights(base), once)
    of_base.unload()
    assert of_refiner.active == []
    assert same(weights(base), before[0])
    assert same(weights(refiner), before[1])
    of_refiner.unload()  # of what is gone already
    assert same(weights(refiner), before[1])


def test_each_expert_has_an_adapter(tmp_path: Path) -> None:
    """In an ensemble: an adapter goes on the model that it fits best; those of the other one stay active."""
    base = pipeline(peers.SMALL_BASE)
    refiner = pipeline(peers.SMALL_REFINER, text_encoder_2=base.text_encoder_2)
    plain = weights(base), weights(refiner)
    adapters = Adapters(base, refiner)
    wide = {"layers": ("to_", "fc1", "c_fc"), "parts": ("unet", "text_encoder", "text_encoder_2")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(pipe, report)] = adapters.load(random_file(peers.SMALL_BASE, tmp_path / "base.safetensors", **wide))
        assert pipe is base
        assert report.is_whole
        changed = weights(base), weights(refiner)
        assert same(
            {k: v for k, v in changed[1].items() if "unet" in k}, {k: v for k, v in plain[1].items() if "unet" in k}
        )
        assert not same(changed[0], plain[0])
        deep = random_file(
            peers.SMALL_REFINER, tmp_path / "deep.safetensors", 1, layers=("input_blocks.7",), parts=UNET
        )
        [(pipe, _)] = adapters.load(deep)
        assert pipe is refiner
        assert adapters.active == ["base", "deep"]
        assert same(weights(base), changed[0])
        tower = random_file(peers.SMALL_REFINER, tmp_path / "tower.safetensors", 2, parts=TOWER)
        state = {f"text_encoder_2.{key.split('.', 4)[4]}": tensor for key, tensor in load_file(tower).items()}
        save_file(state, tower)
        both = adapters.load(tower)
        assert [pipe for pipe, _ in both] == [base, refiner]
    assert adapters.active == ["deep", "tower"]  # `base` changed the tower too: it is off as a whole
    assert same(
        {k: v for k, v in weights(base).items() if "unet" in k}, {k: v for k, v in plain[0].items() if "unet" in k}
    )
    adapters.set(["deep", "base"])
    assert adapters.active == ["deep", "base"]
    assert same(weights(base), changed[0])
    adapters.unload()
    assert same(weights(base), plain[0])
    assert same(weights(refiner), plain[1])


def test_a_displaced_adapter_is_inactive_everywhere(refiner: Any, file: Callable[..., Path]) -> None:
    """diffusers leaves it on the text encoders where the new one changes the UNet alone."""
    plain = weights(refiner)
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    adapters.load(file("b", parts=UNET))
    assert adapters.active == ["b"]
    assert all(torch.equal(tensor, plain[key]) for key, tensor in weights(refiner).items() if "encoder" in key)
    adapters.load(file("c", parts=TOWER))  # has nothing in common with b
    assert adapters.active == ["b", "c"]


def test_an_adapter_that_fits_only_in_part_is_told(refiner: Any, tmp_path: Path) -> None:
    path = random_file(peers.TINY_REFINER, tmp_path / "x.safetensors")
    strange = {"unet.nowhere.lora_A.weight": torch.randn(4, 8), "unet.nowhere.lora_B.weight": torch.randn(8, 4)}
    save_file(load_file(path) | strange, path)

    def load_lora_weights() -> list[tuple[Any, Adapter]]:  # a pipeline's
        return Adapters(refiner).load(path)

    message = r"x\.safetensors fits this SDXL refiner only in part: .*1 not in this model: unet\.nowhere"
    with pytest.warns(UserWarning, match=message) as warned:
        [(_, report)] = load_lora_weights()
    assert warned[0].filename == __file__
    assert report.missing == ["unet.nowhere"]


@pytest.mark.parametrize(
    ("names", "numbers", "message"),
    [
        ("stile", None, "unknown adapter 'stile': did you mean 'style'\\? expected one of style, other"),
        (["style", "x"], None, "unknown adapter 'x': expected one of style, other"),
        (["style", "style"], [0.5, 0.5], "the adapter 'style' stands there twice: name it once, with one weight"),
        (["style", "other"], [1.0], "expected one weight for each of 2 adapters, found 1"),
        ("style", [1.0, 0.5], "expected one weight for each of 1 adapters, found 2"),
        ("style", float("nan"), "must be a finite number, found nan for 'style'"),
        (["other", "style"], [0.1, float("inf")], "must be a finite number, found inf for 'style'"),
        ("style", {"unet": 1.0}, "must be a finite number, found {'unet': 1.0} for 'style'"),
        ("style", ["1"], "must be a finite number, found '1' for 'style'"),
    ],
)
def test_bad_input_changes_nothing(
    refiner: Any, file: Callable[..., Path], names: Any, numbers: Any, message: str
) -> None:
    adapters = Adapters(refiner)
    adapters.load(file("style"))
    adapters.load(file("other"))
    adapters.set(["other", "style"], [0.2, 0.4])
    before = weights(refiner)
    with pytest.raises(InputError, match=message):
        adapters.set(names, numbers)
    assert adapters.active == ["other", "style"]
    assert same(weights(refiner), before)


def test_what_is_loaded_without_being_activated_waits(refiner: Any, file: Callable[..., Path]) -> None:
    adapters = Adapters(refiner)
    adapters.load(file("a"))
    before = weights(refiner)
    adapters.load(file("b"), activate=False)
    assert adapters.active == ["a"]
    assert set(adapters.loaded) == {"a", "b"}
    assert same(weights(refiner), before)
    adapters.load(file("a"), activate=False)  # the name again: what it was is gone
    assert adapters.active == []


def test_an_adapter_that_fits_nowhere_changes_nothing(tmp_path: Path, file: Callable[..., Path]) -> None:
    base, refiner = pipeline(peers.TINY_BASE), pipeline(peers.TINY_REFINER)
    adapters = Adapters(base, refiner)
    adapters.load(file("a"), "a")
    before = weights(base), weights(refiner)
    save_file({"x.lora_A.weight": torch.ones(1, 4), "x.lora_B.weight": torch.ones(4, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: the adapter fits nothing of this SDXL base"):
        adapters.load(tmp_path / "x.safetensors", "a")
    with pytest.raises(InputError, match="could not read"):
        adapters.load(tmp_path / "none.safetensors", "a")
    assert adapters.active == adapters.loaded == ["a"]
    assert same(weights(base), before[0])
    assert same(weights(refiner), before[1])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_nothing_is_half_applied(
    refiner: Any, file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    adapters = Adapters(refiner)
    plain = weights(refiner)
    adapters.load(file("a"))
    adapters.set("a", 0.5)
    before = weights(refiner)
    changed = on_network.changed

    def fail_at(limit: int) -> Callable[..., Tensor]:
        calls = itertools.count(1)

        def failing(*arguments: Any) -> Tensor:
            if next(calls) == limit:
                raise error
            return changed(*arguments)

        return failing

    calls: list[Callable[[], Any]] = [lambda: adapters.load(file("b")), lambda: adapters.set("a", 2.0)]
    for limit in (1, 7, 17):
        for call in calls:
            monkeypatch.setattr(on_network, "changed", fail_at(limit))
            with pytest.raises(error):
                call()
            assert adapters.active == adapters.loaded == ["a"]
            assert same(weights(refiner), before)
    adapters.unload()
    assert same(weights(refiner), plain)


def test_a_pipeline_without_a_tower(file: Callable[..., Path]) -> None:
    """Whose prompts were encoded elsewhere."""
    refiner = pipeline(peers.TINY_REFINER, text_encoder_2=None)
    plain = weights(refiner)
    Adapters(refiner).load(file("a"))
    assert not same(weights(refiner), plain)
    Adapters(refiner).unload()
    assert same(weights(refiner), plain)
    with pytest.raises(InputError, match="has layers only for a text encoder that this pipeline does not have"):
        Adapters(refiner).load(file("b", parts=TOWER))
    assert Adapters(refiner).loaded == []
