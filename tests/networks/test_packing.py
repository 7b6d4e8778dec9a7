"""Packed networks: the same function up to rounding, under the same names; plain weights come back to the bit."""

import copy
import gc
import pickle
import platform
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adapter_files
import checks
import peers
import pytest
import torch
from cases import diagonal, sample
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_ref import pack, unpack
from sdxl_ref.adapters import lora
from sdxl_ref.config import InputError
from sdxl_ref.networks import packed_layers, packing

# Packed over plain, of their distances to the exact result: the median over seeds. With AVX2 alone oneDNN's products,
# which are packed, sum in longer runs than MKL's, which are plain: 1.11 on bigG's narrow layers.
ROUNDING = 1.1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 1.2
FLOAT32 = 5e-6
BOUND = {torch.float32: FLOAT32, torch.bfloat16: 0.05}  # between two ways of rounding, in a whole network
PACKED_HERE = [dtype for dtype in (torch.float32, torch.bfloat16) if not packing.why_not(nn.Linear(1, 1).to(dtype))]
Calls = dict[str, tuple[Callable[[int], nn.Module], Callable[[Any, torch.dtype, int], Tensor]]]


def noise(network: Any, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, in that of the network: float64 tells what the same numbers would exactly give."""
    return checks.normal(*shape, seed=seed, dtype=dtype).to(next(network.parameters()).dtype)


def run_unet(unet: Any, dtype: torch.dtype, seed: int, size: tuple[int, int] = (12, 20), batch: int = 2) -> Tensor:
    x = noise(unet, batch, 4, *size, seed=seed, dtype=dtype)
    context = noise(unet, batch, 77, 64, seed=seed + 1, dtype=dtype)
    y = noise(unet, batch, 1328, seed=seed + 2, dtype=dtype)
    result: Tensor = unet(x, torch.tensor([100.0] * batch), context, y)
    return result


def run_tower(pick: int, tower: Any, _: torch.dtype, seed: int) -> Tensor:
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    tokens[:, 1:9] = torch.randint(1, 49000, (2, 8), generator=torch.Generator().manual_seed(seed))
    tokens[:, 9] = 49407
    outputs = tower(tokens)
    result: Tensor = outputs[pick] if isinstance(outputs, tuple) else outputs
    return result


def encode(vae: Any, dtype: torch.dtype, seed: int) -> Tensor:
    mean: Tensor = vae.encode(noise(vae, 2, 3, 40, 32, seed=seed, dtype=dtype).clamp(-1, 1)).mean
    return mean


def decode(vae: Any, dtype: torch.dtype, seed: int) -> Tensor:
    pictures: Tensor = vae.decode(noise(vae, 2, 4, 5, 4, seed=seed, dtype=dtype))
    return pictures


NETWORKS: Calls = {  # how each is made and run
    "unet": (lambda seed: peers.small_unet(seed=seed), run_unet),
    "encoder": (lambda seed: peers.small_vae(seed=seed), encode),
    "decoder": (lambda seed: peers.small_vae(seed=seed), decode),
    "bigG": (lambda seed: peers.small_openclip(seed=seed), partial(run_tower, 0)),
    "pooled": (lambda seed: peers.small_openclip(seed=seed), partial(run_tower, 1)),
    "CLIP-L": (lambda seed: peers.small_clip(seed=seed), partial(run_tower, 0)),
}


@pytest.fixture(autouse=True)
def _for_inference() -> Any:
    with torch.no_grad():
        yield


def network_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    return NETWORKS[name][0](seed).to(dtype).eval().requires_grad_(False)


def tiny_unet() -> nn.Module:
    """For what is done with a UNet's layers; each kind of them is in it."""
    unet: nn.Module = peers.network("unet", peers.TINY_REFINER)
    return unet


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_this_machine_packs(dtype: torch.dtype) -> None:
    """Or else the tests below test little: what cannot be packed is refused with a reason."""
    if dtype not in PACKED_HERE and dtype != torch.float32:
        with pytest.raises(InputError, match=f"this network cannot be packed: this CPU has no kernels for {dtype}"):
            pack(nn.Linear(1, 1).to(dtype))
        pytest.skip(f"this CPU has no kernels for {dtype}: packing was not tried in it")
    assert dtype in PACKED_HERE


@pytest.mark.parametrize("seeds", [4, pytest.param(20, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("name", "dtype"), diagonal([*NETWORKS], PACKED_HERE))
def test_it_rounds_no_worse_than_plain(name: str, dtype: torch.dtype, seeds: int) -> None:
    ratios = []
    for seed in range(seeds):
        plain = network_of(name, dtype, seed)
        run = NETWORKS[name][1]
        exact = run(copy.deepcopy(plain).double(), dtype, seed)
        packed = run(pack(plain), dtype, seed)
        ratios.append(peers.distance(packed, exact) / peers.distance(run(plain, dtype, seed), exact))
    print(f"{name} {dtype}: median ratio {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "dtype"),
    dict.fromkeys([*((name, PACKED_HERE[-1]) for name in NETWORKS), ("unet", torch.float32), ("bigG", torch.float32)]),
)
def test_the_plain_network_stays_and_comes_back(name: str, dtype: torch.dtype) -> None:
    plain = network_of(name, dtype)
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    names = [key for key, _ in plain.named_modules()]
    packed = pack(plain)
    run = NETWORKS[name][1]
    assert peers.distance(run(packed, dtype, 0), run(plain, dtype, 0)) <= BOUND[dtype]
    assert packing.is_packed(packed)
    assert not packing.is_packed(plain)
    assert [key for key, _ in packed.named_modules()] == names
    assert adapter_files.same(before, dict(plain.state_dict()))
    back = unpack(packed)
    assert packing.is_packed(packed)
    assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
    assert adapter_files.same(before, dict(back.state_dict()))
    assert torch.equal(run(back, dtype, 0), run(plain, dtype, 0))
    assert pack(plain, consume=True) is plain
    assert unpack(plain, consume=True) is plain
    assert adapter_files.same(before, dict(plain.state_dict()))


def test_convolutions_stay_plain_in_float32() -> None:
    """Their packed kernels round worse."""
    vae = network_of("decoder")
    block = "decoder.up.0.block.0"
    x = checks.normal(1, 64, 9, 7, seed=0).float()
    assert torch.equal(pack(vae).get_submodule(block)(x), vae.get_submodule(block)(x))


@pytest.mark.skipif(torch.bfloat16 not in PACKED_HERE, reason="convolutions are packed in half precision")
def test_a_convolution_that_pads_otherwise_stays_plain_or_says_so() -> None:
    """As users set it for textures that tile."""
    conv = network_of("unet", torch.bfloat16).get_submodule("middle_block.0.in_layers.2")
    x = checks.normal(1, 128, 8, 8, seed=0, dtype=torch.bfloat16)
    packed = pack(conv)
    packed(x)
    conv.padding_mode = packed.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert torch.equal(pack(conv)(x), conv(x))
    with pytest.raises(InputError, match=r"pads with zeros, and no other way: use sdxl_ref\.unpack"):
        packed(x)


BLOCK = "middle_block.1.transformer_blocks.0"
FUSED = [  # layers that are computed together with others
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn1.to_v",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
]


@pytest.mark.parametrize("name", FUSED)
def test_who_watches_a_layer_of_a_fused_block(name: str) -> None:
    """Sees what goes in and comes out, and may change it; and all is as before once nobody watches."""
    plain = tiny_unet()
    packed = pack(plain)
    before = run_unet(packed, torch.float32, 0)
    calls: dict[str, list[Tensor]] = {}
    changed = {}
    for kind, network in (("plain", plain), ("packed", packed)):

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, kind: str = kind) -> Tensor:
            calls[kind] = [inputs[0], output]
            return -output

        handle = network.get_submodule(name).register_forward_hook(hook)
        changed[kind] = run_unet(network, torch.float32, 0)
        handle.remove()
    for a, b in zip(calls["plain"], calls["packed"], strict=True):
        assert peers.distance(a, b) <= FLOAT32
    assert peers.distance(changed["plain"], changed["packed"]) <= FLOAT32
    assert peers.distance(changed["packed"], before) > 1e-3
    assert torch.equal(run_unet(packed, torch.float32, 0), before)


def set_bias(layer: nn.Module, bias: Tensor) -> None:
    layer.bias = nn.Parameter(bias, requires_grad=False)


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)  # type: ignore[no-any-return]


def replaced(network: nn.Module, name: str, new: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent).register_module(child, new(network.get_submodule(name)))


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "wrapped": lambda net: replaced(net, f"{BLOCK}.attn1.to_v", Doubled),
    "wrapped key of the text": lambda net: replaced(net, f"{BLOCK}.attn2.to_k", Doubled),
    "wrapped feed-forward": lambda net: replaced(net, f"{BLOCK}.ff.net.0.proj", Doubled),
    "another layer": lambda net: replaced(net, f"{BLOCK}.attn1.to_q", lambda old: nn.Linear(64, 64)),
    "a bias": lambda net: set_bias(net.get_submodule(f"{BLOCK}.attn1.to_v"), torch.full((64,), 3.0)),
    "a bias of the text": lambda net: set_bias(net.get_submodule(f"{BLOCK}.attn2.to_v"), torch.full((64,), 3.0)),
    "a strided bias": lambda net: set_bias(net.get_submodule(f"{BLOCK}.ff.net.2"), torch.arange(128.0)[::2] / 25),
    "an expanded bias": lambda net: set_bias(net.get_submodule(f"{BLOCK}.ff.net.0.proj"), torch.ones(1).expand(512)),
}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_of_layers_count_before_and_after(name: str, first: bool) -> None:
    plain = tiny_unet()
    before = run_unet(plain, torch.float32, 0)
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    packed = pack(copy.deepcopy(plain), consume=True)
    torch.manual_seed(0)
    EDITS[name](plain)
    torch.manual_seed(0)
    if first:
        packed = pack(copy.deepcopy(plain), consume=True)
    else:
        EDITS[name](packed)
    after = run_unet(plain, torch.float32, 0)
    assert peers.distance(after, before) > 1e-3
    assert peers.distance(run_unet(packed, torch.float32, 0), after) <= FLOAT32
    kept = {key: tensor for key, tensor in unpack(packed).state_dict().items() if key in state and "bias" not in key}
    if name != "another layer":
        assert adapter_files.same({key: state[key] for key in kept}, kept)


def test_what_unpack_gives_back_is_the_network() -> None:
    """Its parameters in their order, trained or not, also in inference mode; and nothing of it outlives it."""
    plain = tiny_unet().requires_grad_(True)
    plain.get_submodule("time_embed.0").requires_grad_(False)
    with torch.inference_mode():
        back = unpack(pack(plain))
    theirs = [(key, parameter.requires_grad) for key, parameter in plain.named_parameters()]
    assert [(key, parameter.requires_grad) for key, parameter in back.named_parameters()] == theirs
    assert not any(parameter.is_inference() for parameter in back.parameters())
    packed = pack(plain)
    watch = weakref.ref(packed.get_submodule(f"{BLOCK}.ff.net.0.proj"))
    gc.collect()
    gc.disable()
    try:
        del packed
        assert watch() is None
    finally:
        gc.enable()


def test_layers_whose_weight_another_tool_computes_stay_as_they_are() -> None:
    plain = tiny_unet()
    torch.nn.utils.parametrizations.weight_norm(plain.get_submodule(f"{BLOCK}.attn1.to_q"))
    plain.get_submodule(f"{BLOCK}.attn2").to_v = plain.get_submodule(f"{BLOCK}.attn2.to_k")
    assert peers.distance(*(run_unet(net, torch.float32, 0) for net in (pack(plain), plain))) <= FLOAT32


def test_a_layer_of_somebody_else_in_a_block_is_left_alone() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain = tiny_unet()
    plain.get_submodule(f"{BLOCK}.attn1.to_q").__class__ = Twice
    packed = pack(plain)
    assert type(packed.get_submodule(f"{BLOCK}.attn1.to_q")) is Twice
    assert peers.distance(run_unet(packed, torch.float32, 0), run_unet(plain, torch.float32, 0)) <= FLOAT32


def text(batch: int, tokens: int = 77, seed: int = 1) -> Tensor:
    return checks.normal(batch, tokens, 64, seed=seed).float()


def run_with(unet: Any, context: Tensor) -> Tensor:
    x = checks.normal(len(context), 4, 8, 8, seed=0).float()
    y = checks.normal(len(context), 1328, seed=2).float()
    result: Tensor = unet(x, torch.tensor([100.0] * len(context)), context, y)
    return result


def test_the_text_is_read_anew_where_it_or_the_weights_changed() -> None:
    """Its keys and values are kept from one evaluation to the next."""
    plain = tiny_unet()
    packed = pack(plain)
    context = text(2)
    first = run_with(packed, context)
    assert torch.equal(run_with(packed, context), first)
    assert torch.equal(run_with(packed, context.clone()), first)
    context.data[:, 3] += 1
    assert peers.distance(run_with(packed, context), run_with(plain, context)) <= FLOAT32
    assert not torch.equal(run_with(packed, context), first)
    for seed in range(3):  # tensors that may lie where the one before lay
        assert peers.distance(*(run_with(net, text(1, seed=seed)) for net in (packed, plain))) <= FLOAT32
    block: Any = packed.get_submodule(f"{BLOCK}.attn2")
    assert block.text is None  # the text is gone
    run_with(packed, context)
    assert block.text is not None
    name = f"{BLOCK}.attn2.to_k.weight"
    with packing.plain_weights(packed, [name]):
        packed.get_parameter(name).mul_(3)
    plain.get_parameter(name).mul_(3)
    assert peers.distance(run_with(packed, context), run_with(plain, context)) <= FLOAT32


def test_texts_of_other_lengths() -> None:
    plain = tiny_unet()
    packed = pack(plain)
    for tokens in (1, 16, 80, 154):
        context = text(2, tokens)
        assert peers.distance(run_with(packed, context), run_with(plain, context)) <= FLOAT32


def test_a_text_that_is_changed_in_inference_mode() -> None:
    packed = pack(tiny_unet())
    with torch.inference_mode():
        context = text(2)
        first = run_with(packed, context)
        context.mul_(2)
        changed = run_with(packed, context)
    assert peers.distance(changed, run_with(packed, context.clone())) <= FLOAT32
    assert peers.distance(changed, first) > 1e-3


def test_what_the_copy_changes_is_its_own() -> None:
    plain = tiny_unet()
    packed = pack(plain)
    bias = packed.get_parameter("time_embed.0.bias")
    bias.add_(1)
    assert not torch.equal(bias, plain.get_parameter("time_embed.0.bias"))


@pytest.mark.parametrize("dtype", sample(PACKED_HERE, PACKED_HERE[-1]), ids=str)
def test_pictures_of_any_size_after_packing(dtype: torch.dtype) -> None:
    """Also in turns: weights are brought into another order and back."""
    plain = network_of("unet", dtype)
    double = copy.deepcopy(plain).double()
    packed = pack(plain)
    sizes = [((8, 8), 1), ((33, 17), 2), ((2, 3), 1), ((8, 8), 3)]
    for size, batch in sizes:
        ratios = []
        for seed in range(3):  # of a few cells one alone may round by chance
            ours, theirs, exact = (run_unet(network, dtype, seed, size, batch) for network in (packed, plain, double))
            ratios.append(peers.distance(ours, exact) / peers.distance(theirs, exact))
        assert statistics.median(ratios) <= 2  # with few seeds: see above for more
        assert torch.equal(ours, run_unet(pack(plain), dtype, seed, size, batch))
    assert adapter_files.same(dict(plain.state_dict()), dict(unpack(packed).state_dict()))


def test_hooks_and_edits_work_by_the_official_names() -> None:
    plain = tiny_unet()
    name = "middle_block.1.transformer_blocks.0.attn2.to_v"
    seen: list[Tensor] = []
    plain.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    packed = pack(plain)
    run_unet(packed, torch.float32, 0)
    [before] = seen
    packed.get_submodule(name).register_forward_hook(lambda _, __, output: 0 * output)
    without = run_unet(packed, torch.float32, 0)
    plain.get_submodule(name).register_forward_hook(lambda _, __, output: 0 * output)
    assert peers.distance(without, run_unet(plain, torch.float32, 0)) <= FLOAT32
    assert peers.distance(before, seen[-2]) <= FLOAT32


@pytest.mark.parametrize("kind", sample(adapter_files.CONFIGS, "base"))
def test_adapters_before_and_after_give_the_same(kind: str, tmp_path: Path) -> None:
    """Matrices, kernels and the stacked projection; taken off, the weights are what they were, to the bit."""
    config = adapter_files.CONFIGS[kind]
    adapter = lora.load(adapter_files.random_file(config, tmp_path / "a.safetensors"), config)
    parts = {part: net.eval().requires_grad_(False) for part, net in adapter_files.networks(config).items()}
    before = {part: {key: t.clone() for key, t in net.state_dict().items()} for part, net in parts.items()}
    changed = {part: net for part, net in copy.deepcopy(parts).items() if part != "vae"}
    adapter_files.put_on(changed, (adapter, 0.7))
    first = {part: pack(net) for part, net in changed.items()}
    then = {part: pack(net) for part, net in parts.items() if part != "vae"}
    adapter_files.put_on(then, (adapter, 0.7))
    assert all(packing.is_packed(net) for net in then.values())
    for a, b in zip(adapter_files.outputs(first, config), adapter_files.outputs(then, config), strict=True):
        assert torch.equal(a, b)
    plain = adapter_files.outputs(parts, config)
    changes = [peers.distance(a, b) for a, b in zip(adapter_files.outputs(then, config), plain, strict=True)]
    assert min(changes) > 1e-3
    adapter_files.put_on(then)
    for part, net in then.items():
        assert adapter_files.same(before[part], dict(unpack(net).state_dict()))


def test_a_change_of_a_bias(tmp_path: Path) -> None:
    config = peers.SMALL_REFINER
    save_file({"lora_unet_out_2.diff_b": torch.ones(4)}, tmp_path / "a.safetensors")
    adapter = lora.load(tmp_path / "a.safetensors", config)
    parts = adapter_files.networks(config)
    packed = {"unet": pack(parts["unet"].eval())}
    plain = run_unet(packed["unet"], torch.float32, 0)
    adapter_files.put_on(packed, (adapter, 1.0))
    assert peers.distance(run_unet(packed["unet"], torch.float32, 0), plain + 1) <= FLOAT32


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "training": (lambda net: net.train(), "cannot be trained"),
    "saving": (lambda net: net.state_dict(), "has no state_dict"),
    "loading": (lambda net: net.load_state_dict({}, strict=False), "cannot be given other weights"),
    "another dtype": (lambda net: net.to(torch.float16), "cannot be moved to cpu and torch.float16"),
    "another device": (lambda net: net.to("meta"), "cannot be moved to meta"),
    "no weights": (lambda net: net.to_empty(device="cpu"), "cannot be emptied"),
    "a file": (lambda net: pickle.dumps(net), "cannot be written to a file"),
}


@pytest.mark.parametrize(("network", "name"), diagonal(["unet", "decoder", "bigG", "CLIP-L"], [*REFUSED]))
def test_what_needs_plain_weights_names_the_way_back(network: str, name: str) -> None:
    """Before anything has changed, also where the first layers are plain."""
    call, message = REFUSED[name]
    plain = network_of(network)
    packed = pack(plain)
    with pytest.raises(InputError, match=rf"{message}.*: use sdxl_ref.unpack\(network\), or pipe.unpack\(\), first"):
        call(packed)
    assert not any(module.training for module in packed.modules())
    assert adapter_files.same(dict(plain.state_dict()), dict(unpack(packed).state_dict()))


WEIGHTS = {
    "unet": "time_embed.0.weight",
    "bigG": "transformer.resblocks.0.mlp.c_fc.weight",
    "CLIP-L": "text_model.encoder.layers.0.mlp.fc1.weight",
}


@pytest.mark.parametrize("network", WEIGHTS)
def test_the_weight_of_a_packed_layer_is_not_to_be_had(network: str) -> None:
    told = r"the weight of a packed layer is not to be had: use sdxl_ref.unpack\(network\), or pipe.unpack\(\), first"
    with pytest.raises(InputError, match=told):
        pack(network_of(network)).get_parameter(WEIGHTS[network])


def test_a_copy_computes_the_same_and_is_its_own() -> None:
    packed = pack(network_of("CLIP-L"))
    other = copy.deepcopy(packed)
    bias: Any = other.get_parameter("text_model.encoder.layers.0.mlp.fc1.bias")
    usual = run_tower(0, packed, torch.float32, 0)
    assert torch.equal(run_tower(0, other, torch.float32, 0), usual)
    bias.add_(1)
    assert torch.equal(run_tower(0, packed, torch.float32, 0), usual)
    assert not torch.equal(run_tower(0, other, torch.float32, 0), usual)
    assert not packing.is_packed(unpack(other))


def test_a_stop_in_the_middle_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while weights are reordered."""
    network = tiny_unet()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    usual = packed_layers.reordered_matrix
    calls: list[int] = []

    def stop(weight: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return usual(weight)

    monkeypatch.setattr(packed_layers, "reordered_matrix", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(network, consume=True)
    assert adapter_files.same(before, dict(unpack(network, consume=True).state_dict()))


def test_a_layer_that_is_computed_with_others_is_not_unpacked_alone() -> None:
    packed = pack(tiny_unet())
    with pytest.raises(InputError, match="unpack the block that holds it"):
        unpack(packed.get_submodule("middle_block.1.transformer_blocks.0.attn1.to_v"))


def test_another_dtype_by_autocast_says_so() -> None:
    packed = pack(tiny_unet())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"cannot compute in torch\.bfloat16"):
        run_unet(packed, torch.float32, 0)


def test_inputs_of_another_width_say_so() -> None:
    layer = pack(nn.Sequential(nn.Linear(8, 4)).requires_grad_(False))
    with pytest.raises(RuntimeError, match=r"expected 8 features, found an input of \(2, 9\)"):
        layer(torch.zeros(2, 9))


def test_gradients_are_refused() -> None:
    packed = pack(network_of("CLIP-L"))
    layer = packed.get_submodule("text_model.encoder.layers.0.mlp.fc1")
    with torch.enable_grad(), pytest.raises(InputError, match="a packed network has no gradients"):
        layer(torch.zeros(1, 1, layer.in_features, requires_grad=True))
    vae: Any = pack(network_of("decoder"))
    with torch.enable_grad(), pytest.raises(InputError, match="a packed network has no gradients"):
        vae.decode(torch.zeros(1, 4, 4, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.double(), "this CPU has no kernels for torch.float64"),
        (lambda net: net.to("meta"), "expected its parameters on the CPU, found meta"),
    ],
    ids=["float64", "without weights"],
)
def test_what_cannot_be_packed_is_left_as_it_is(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    network = change(network_of("CLIP-L"))
    with pytest.raises(InputError, match=f"cannot be packed: {message}"):
        pack(network, consume=True)
    assert not packing.is_packed(network)


def test_a_network_that_is_read_when_it_works_is_not_copied() -> None:
    network = network_of("CLIP-L")
    network.drop_weights = lambda: None  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"read when it works, and a copy would not be: use pipe\.pack"):
        pack(network)


def test_without_onednn_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(InputError, match="this PyTorch has no oneDNN that packs weights: use it as it is"):
        pack(network_of("CLIP-L"))


# --- memory -------------------------------------------------------------------------------------------------------

CHURN = """
import resource
import torch
from sdxl_ref import pack
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def churn():
    before = faults()
    for _ in range(20):
        torch.ones(10 << 20)  # 40 MiB: more than glibc ever keeps by itself
    return faults() - before
churn()
print(before := churn())
pack(torch.nn.Linear(1, 1).requires_grad_(False))
churn()
print(churn())
"""
GLIBC = platform.libc_ver()[1].split(".") if platform.libc_ver()[0] == "glibc" else ["0"]


@pytest.mark.skipif(list(map(int, GLIBC)) < [2, 35], reason="glibc's malloc alone is told, and an older one refuses")
def test_freed_memory_is_used_again() -> None:
    """Without it each tensor is made of new pages: at least one page fault for every 2 MiB."""
    output = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before >= 20 * 20
    assert after < 20
