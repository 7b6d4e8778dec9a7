"""Adapters: every form against the library that writes it, on diffusers' and transformers' own networks."""

import json
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_ref import layouts, lora
from sdxl_ref.checkpoint import build, prefixes
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.lora import Applied
from sdxl_ref.lora_forms import FORMS
from sdxl_ref.saving import save_checkpoint
from weights_convert.adapters import convert_adapter, extract, merge

CONFIGS = {"base": peers.SMALL_BASE, "refiner": peers.SMALL_REFINER}
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "conv_in"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1", "text_projection"]


def networks(config: ModelConfig) -> dict[str, nn.Module]:
    return {part: peers.randomise(build(part, config), i) for i, part in enumerate(prefixes(config))}


def unet_inputs(config: ModelConfig) -> tuple[Tensor, ...]:
    def noise(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    x, context = noise(2, 4, 8, 8, seed=1), noise(2, 77, config.unet.context_dim, seed=2)
    return x, torch.tensor([3, 199]), context, noise(2, config.unet.adm_in_channels, seed=3)


def with_peft(peer: nn.Module, targets: list[str], rank: int = 4, alpha: float = 2.0, **options: Any) -> Any:
    """The peer with a random adapter by the PEFT library in it."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(0)
    return inject_adapter_in_model(config, peer)


def peft_state(peer: nn.Module, prefix: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {f"{prefix}.{k}": v.clone() for k, v in get_peft_model_state_dict(peer).items()}


def kohya(state: dict[str, Tensor], alpha: float, names: dict[str, str]) -> dict[str, Tensor]:
    """PEFT's tensors as kohya's trainer names them; `names` are the prefixes of the parts."""
    found = {}
    for key, tensor in state.items():
        module, factor = key.rsplit(".lora_", 1)
        part, _, path = module.partition(".")
        name = names[part] + path.replace(".", "_")
        found[f"{name}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "with convolutions"])
@pytest.mark.parametrize("form", ["peft", "kohya", "kohya official", "old diffusers"])
def test_unet_adapters_give_what_peft_gives_on_diffusers(
    kind: str, convolutions: bool, form: str, tmp_path: Path
) -> None:
    config = CONFIGS[kind]
    unet = networks(config)["unet"]
    peer = with_peft(peers.diffusers_unet(unet), LINEAR + CONVOLUTIONS * convolutions)  # type: ignore[arg-type]
    inputs = unet_inputs(config)
    expected = peers.call_diffusers_unet(peer, *inputs)
    state = peft_state(peer, "unet")
    if form == "peft":  # which has no alpha in the file: 2 / 4 goes into one factor, as diffusers' own saving does not
        state = {k: v * 0.5 if ".lora_B." in k else v for k, v in state.items()}
    elif form == "kohya":
        state = kohya(state, 2.0, {"unet": "lora_unet_"})
    elif form == "kohya official":
        rules = layouts.rules("unet", unet.state_dict(), config.unet)
        official = {layouts.module_of(r.other[0]): layouts.module_of(r.official) for r in rules}
        renamed = {}
        for key, tensor in state.items():
            module, factor = key.removeprefix("unet.").rsplit(".lora_", 1)
            renamed[f"unet.{official[module]}.lora_{factor}"] = tensor
        state = kohya(renamed, 2.0, {"unet": "lora_unet_"})
    else:
        old = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
        scaled = {k: v * 0.5 if ".lora_B." in k else v for k, v in state.items()}
        state = {k.replace(a, b): v for k, v in scaled.items() for a, b in old.items() if k.endswith(a)}
    save_file(state, tmp_path / "adapter.safetensors")

    adapter = lora.fit(lora.read(tmp_path / "adapter.safetensors"), config)
    assert not adapter.missing
    assert not adapter.misshapen
    applied = Applied({"unet": unet})
    before = unet(*inputs)
    applied.apply((adapter, 1.0))
    found = unet(*inputs)
    assert peers.distance(found, expected) <= 1e-5
    assert peers.distance(before, expected) > 1e-2
    applied.remove()
    assert torch.equal(unet(*inputs), before)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_text_adapters_give_what_peft_gives_on_transformers(kind: str, form: str, tmp_path: Path) -> None:
    """On bigG one of q, k and v alone: its rows of the stacked matrix; and its projection, applied from the right."""
    config = CONFIGS[kind]
    parts = networks(config)
    tokens = torch.full((1, 77), 49407)
    tokens[0, :4] = torch.tensor([49406, 320, 1929, 49407])
    state: dict[str, Tensor] = {}
    peer = with_peft(peers.transformers_openclip(parts["text_encoder_2"]), TEXT)  # type: ignore[arg-type]
    state |= peft_state(peer, "text_encoder_2")
    expected = peer(tokens, output_hidden_states=True)
    if kind == "base":
        clip = with_peft(peers.transformers_clip(parts["text_encoder"]), TEXT[:-1])  # type: ignore[arg-type]
        own = peft_state(clip, "text_encoder")
        state |= {
            k if ".text_model." in k else k.replace("text_encoder.", "text_encoder.text_model."): v
            for k, v in own.items()
        }
        expected_clip = clip(tokens, output_hidden_states=True).hidden_states[-2]
    if form == "peft":
        state = {k: v * 0.5 if ".lora_B." in k else v for k, v in state.items()}
    else:
        second = "lora_te2_" if kind == "base" else "lora_te_"
        state = kohya(state, 2.0, {"text_encoder": "lora_te1_", "text_encoder_2": second})
    save_file(state, tmp_path / "adapter.safetensors")
    adapter = lora.fit(lora.read(tmp_path / "adapter.safetensors"), config)
    assert not adapter.missing
    assert not adapter.misshapen
    Applied(parts).apply((adapter, 1.0))
    hidden, pooled = parts["text_encoder_2"](tokens)
    assert peers.distance(hidden, expected.hidden_states[-2]) <= 1e-5
    assert peers.distance(pooled, expected.text_embeds) <= 1e-5
    if kind == "base":
        assert peers.distance(parts["text_encoder"](tokens), expected_clip) <= 1e-5


def test_each_part_has_its_own_alpha_in_what_diffusers_saves(tmp_path: Path) -> None:
    """The configurations of PEFT stand in the file's metadata: patterns by layer, and the root of the rank."""
    from diffusers import StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    parts = networks(peers.SMALL_BASE)
    built = {
        "unet": with_peft(
            peers.diffusers_unet(parts["unet"]),  # type: ignore[arg-type]
            ["to_q", "to_k"],
            alpha=2.0,
            alpha_pattern={"attn1.to_q": 6.0, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 12.0},
            rank_pattern={"attn1.to_q": 3},
        ),
        "text_encoder": with_peft(peers.transformers_clip(parts["text_encoder"]), ["q_proj"], 4, 8.0),  # type: ignore[arg-type]
        "text_encoder_2": with_peft(
            peers.transformers_openclip(parts["text_encoder_2"]),  # type: ignore[arg-type]
            ["fc1"],
            9,
            5.0,
            use_rslora=True,
        ),
    }
    arguments: dict[str, Any] = {}
    for part, peer in built.items():
        arguments[f"{part}_lora_layers"] = get_peft_model_state_dict(peer)
        arguments[f"{part}_lora_adapter_metadata"] = peer.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **arguments)
    found = lora.read(tmp_path / "pytorch_lora_weights.safetensors")
    alphas = {part: {f.alpha / f.rank for name, f in found.items() if name.startswith(f"{part}.")} for part in built}
    assert alphas == {"unet": {2 / 4, 6 / 3, 12 / 4}, "text_encoder": {8 / 4}, "text_encoder_2": {5 / 3}}
    assert found["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"].alpha == 12
    Applied(parts).apply((lora.fit(found, peers.SMALL_BASE), 1.0))
    inputs = unet_inputs(peers.SMALL_BASE)
    expected = peers.call_diffusers_unet(built["unet"], *inputs)
    assert peers.distance(parts["unet"](*inputs), expected) <= 1e-5
    tokens = torch.full((1, 77), 49407)
    states = {part: built[part](tokens, output_hidden_states=True).hidden_states[-2] for part in list(built)[1:]}
    assert peers.distance(parts["text_encoder"](tokens), states["text_encoder"]) <= 1e-5
    assert peers.distance(parts["text_encoder_2"](tokens)[0], states["text_encoder_2"]) <= 1e-5


PLAIN = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (f"{PLAIN}.lora_A.weight", "text_encoder.encoder.layers.1.self_attn.q_proj.lora_A.weight"),
        (f"{PLAIN}.lora_A.weight", "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"),
        (f"{PLAIN}.lora_A.weight", f"{PLAIN}.lora_linear_layer.down.weight"),
        (f"{PLAIN}.lora_A.weight", f"base_model.model.{PLAIN}.lora_A.default.weight"),
        (f"{TO_Q}.lora_A.weight", f"{TO_Q.removesuffix('to_q')}processor.to_q_lora.down.weight"),
    ],
)
def test_names_of_older_and_newer_tools(name: str, other: str, tmp_path: Path) -> None:
    """CLIP-L without `text_model.` (transformers 5), `lora_linear_layer` and processors (diffusers before PEFT)."""
    size = peers.SMALL_BASE.text_encoders[0].width if name.startswith(PLAIN) else 128
    down, up = torch.randn(2, size), torch.randn(size, 2)
    adapters = []
    for each in (name, other):
        second = each.replace("lora_A", "lora_B").replace("down", "up")
        save_file({each: down, second: up}, tmp_path / "x.safetensors")
        adapters.append(lora.fit(lora.read(tmp_path / "x.safetensors"), peers.SMALL_BASE))
    (place, factors), (same, others) = (next(iter(each.layers.items())) for each in adapters)
    assert place == same
    assert torch.equal(factors.delta(), others.delta())
    both = load_file(tmp_path / "x.safetensors") | {name: down, name.replace("_A", "_B"): up}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"two layers of the adapter act on {place.part}.{place.key}|holds .* twice"):
        lora.fit(lora.read(tmp_path / "x.safetensors"), peers.SMALL_BASE)


@pytest.mark.parametrize("form", ["peft", "official"])
def test_alpha_goes_into_a_factor_unrounded(form: str, tmp_path: Path) -> None:
    """A third is no number of float16: the factor that takes it in is float32."""
    name = f"lora_te1_{PLAIN.removeprefix('text_encoder.').replace('.', '_')}"
    down, up = torch.randn(3, 32).half(), torch.randn(32, 3).half()
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "x.safetensors")
    convert_adapter(tmp_path / "x.safetensors", peers.SMALL_BASE, tmp_path / "y.safetensors", form)
    [place] = lora.fit(lora.read(tmp_path / "x.safetensors"), peers.SMALL_BASE).layers
    [factors] = lora.fit(lora.read(tmp_path / "y.safetensors"), peers.SMALL_BASE).layers.values()
    assert place.part == "text_encoder"
    assert peers.distance(factors.delta(), up.double() @ down.double() / 3) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_float8(dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = torch.randn(2, 32).to(dtype), torch.randn(32, 2).to(dtype)
    save_file({f"{PLAIN}.lora_A.weight": down, f"{PLAIN}.lora_B.weight": up}, tmp_path / "x.safetensors")
    convert_adapter(tmp_path / "x.safetensors", peers.SMALL_BASE, tmp_path / "y.safetensors", "kohya")
    [factors] = lora.fit(lora.read(tmp_path / "y.safetensors"), peers.SMALL_BASE).layers.values()
    assert factors.down.dtype == dtype
    assert peers.distance(factors.delta(), up.double() @ down.double()) <= 1e-6


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def random_file(config: ModelConfig, path: Path, seed: int = 0, rank: int = 3) -> Path:
    """An adapter in official names on a matrix, a kernel, and a stacked projection."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for part, prefix in prefixes(config).items():
        if part != "vae":
            for name, p in build(part, config).named_parameters():
                if p.ndim >= 2 and any(x in name for x in ("attn1.to_q", "in_layers.2", "in_proj", "fc1", "c_fc")):
                    shapes[prefix + layouts.module_of(name)] = p.shape
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.lora_A.weight"] = 0.1 * torch.randn((rank, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator)
        state[f"{name}.lora_B.weight"] = 0.1 * up
    save_file(state, path)
    return path


def outputs(parts: dict[str, nn.Module], config: ModelConfig) -> list[Tensor]:
    tokens = torch.full((1, 77), 49407)
    tokens[0, 0] = 49406
    found = [parts["unet"](*unet_inputs(config)), *parts["text_encoder_2"](tokens)]
    return [*found, parts["text_encoder"](tokens)] if "text_encoder" in parts else found


def test_several_scales_and_removal(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    parts = networks(config)
    first, second = (
        lora.fit(lora.read(random_file(config, tmp_path / f"{seed}.safetensors", seed)), config) for seed in (1, 2)
    )
    plain = outputs(parts, config)
    applied = Applied(parts)
    applied.apply((first, 0.5), (first, 0.5))
    halves = outputs(parts, config)
    applied.apply((first, 1.0))  # in place of the two
    for a, b in zip(outputs(parts, config), halves, strict=True):
        assert peers.distance(a, b) <= 1e-5
    applied.apply((first, 1.0), (second, -0.7))
    assert all(not torch.equal(a, b) for a, b in zip(outputs(parts, config), halves, strict=True))
    applied.apply((first, 1.0), (first, -1.0))
    for a, b in zip(outputs(parts, config), plain, strict=True):
        assert peers.distance(a, b) <= 1e-5
    applied.remove()
    assert all(torch.equal(a, b) for a, b in zip(outputs(parts, config), plain, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_conversion_between_the_forms_keeps_the_change(kind: str, form: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    source = random_file(config, tmp_path / "official.safetensors")
    convert_adapter(source, config, tmp_path / "converted.safetensors", form)
    convert_adapter(tmp_path / "converted.safetensors", config, tmp_path / "back.safetensors", "official")
    results = []
    for name in ("official", "converted", "back"):
        parts = networks(config)
        adapter = lora.fit(lora.read(tmp_path / f"{name}.safetensors"), config)
        assert not adapter.missing
        Applied(parts).apply((adapter, 1.0))
        results.append(outputs(parts, config))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert peers.distance(a, b) <= 1e-5


def test_merged_weights_give_the_applied_adapters_outputs(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    parts = networks(config)
    save_checkpoint(tmp_path / "model.safetensors", config, parts, torch.float32)
    files = [random_file(config, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    scales = (0.8, -0.3)
    adapters = list(zip(files, scales, strict=True))
    report = merge(tmp_path / "model.safetensors", adapters, tmp_path / "merged.safetensors")
    assert "tensors changed" in str(report)
    from sdxl_ref.checkpoint import open_checkpoint

    merged = open_checkpoint(tmp_path / "merged.safetensors")
    loaded = {part: merged.load(part) for part in prefixes(config)}
    Applied(parts).apply(*((lora.fit(lora.read(f), config), s) for f, s in adapters))
    for a, b in zip(outputs(loaded, config), outputs(parts, config), strict=True):
        assert peers.distance(a, b) <= 1e-5


def test_extraction_at_full_rank_rebuilds_the_difference(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    parts = networks(config)
    save_checkpoint(tmp_path / "first.safetensors", config, parts, torch.float32)
    merge(
        tmp_path / "first.safetensors",
        [(random_file(config, tmp_path / "lora.safetensors"), 1.0)],
        tmp_path / "second.safetensors",
    )
    two = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    print(extract(*two, tmp_path / "out.safetensors", 1000))
    expected, state = load_file(tmp_path / "second.safetensors"), load_file(tmp_path / "first.safetensors")
    merge(tmp_path / "first.safetensors", [(tmp_path / "out.safetensors", 1.0)], tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for key in expected:
        if not torch.equal(expected[key], state[key]):
            assert peers.distance(again[key] - state[key], expected[key] - state[key]) <= 1e-5, key
    low = extract(*two, tmp_path / "low.safetensors", 3, "official")
    assert float(str(low).split("; ")[1].split(" ")[0]) < 1e-3  # the change has rank 3


def test_extraction_says_what_it_does_not_carry(small_refiner_file: Path, tmp_path: Path) -> None:
    """Biases, norms, embeddings and the VAE; the second file has no metadata, its shapes tell that it is a version."""
    state, second = load_file(small_refiner_file), tmp_path / "second.safetensors"
    carried = "model.diffusion_model.out.2.weight"
    others = [
        "conditioner.embedders.0.model.ln_final.weight",
        "conditioner.embedders.0.model.positional_embedding",
        "conditioner.embedders.0.model.token_embedding.weight",
        "first_stage_model.decoder.conv_out.weight",
        "model.diffusion_model.out.2.bias",
    ]
    changed = {key: state[key] + 0.125 for key in (carried, *others)}
    save_file(state | changed | {"denoiser.sigmas": torch.ones(1000)}, second)
    told = str(extract(small_refiner_file, second, tmp_path / "out.safetensors", 4))
    assert "1 layers of rank at most 4" in told
    assert f"5 other tensors differ, which no adapter carries: {', '.join(others[:3])}, …" in told
    assert {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {"lora_unet_out_2"}
    save_file(state | changed | {carried: state[carried]}, second)
    with pytest.raises(InputError, match="there is nothing to extract; 5 other tensors differ"):
        extract(small_refiner_file, second, tmp_path / "none.safetensors", 4)
    save_file(state | {carried: changed[carried]}, second)
    told = str(extract(small_refiner_file, second, tmp_path / "again.safetensors", 4))
    assert told.endswith("0 other tensors differ, which no adapter carries")


def test_extraction_of_two_models(small_base_file: Path, small_refiner_file: Path, tmp_path: Path) -> None:
    message = r"no two versions of one model: in the second \d+ missing: .*; \d+ unexpected: "
    with pytest.raises(InputError, match=message):
        extract(small_base_file, small_refiner_file, tmp_path / "out.safetensors", 4)


def test_a_merge_that_overflows_is_refused(small_refiner_file: Path, tmp_path: Path) -> None:
    file = random_file(peers.SMALL_REFINER, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"would hold values that are not finite in torch.float16: use a lower scale"):
        merge(small_refiner_file, [(file, 1e7)], tmp_path / "merged.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_refusals(tmp_path: Path) -> None:
    config = peers.SMALL_REFINER
    path = tmp_path / "x.safetensors"

    def refused(state: dict[str, Tensor], message: str, config: ModelConfig = config) -> None:
        save_file(state, path)
        with pytest.raises(InputError, match=message):
            lora.fit(lora.read(path), config)

    good = "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    refused({"weight": up}, "is no LoRA in kohya's, PEFT's, diffusers' or official names: found weight")
    refused({f"{good}.lora_A.weight": down}, "has no up factor: the file is not whole")
    refused({f"{good}.lora_A.weight": down, f"{good}.lora_B.weight": up[:, :3].contiguous()}, "no common rank")
    refused({f"{good}.lora_A.weight": down[:0], f"{good}.lora_B.weight": up[:, :0].contiguous()}, "no common rank")
    whole = {f"{good}.lora_A.weight": down.to(torch.int8), f"{good}.lora_B.weight": up}
    refused(whole, "has factors of torch.int8, expected floating point numbers")
    refused({f"{good}.lora_A.weight": down * torch.nan, f"{good}.lora_B.weight": up}, "not finite")
    refused({"unet.other.lora_A.weight": down, "unet.other.lora_B.weight": up}, "fits nothing of this SDXL refiner")
    refused(
        {f"{good}.lora_A.weight": torch.randn(4, 32), f"{good}.lora_B.weight": torch.randn(32, 4)},
        r"1 of another shape: .*32x32 for 64x64",
    )
    base = random_file(peers.SMALL_BASE, tmp_path / "base.safetensors")
    found = lora.read(base)
    only_base = {name: each for name, each in found.items() if "transformer.text_model" in name}
    with pytest.raises(InputError, match="fits nothing of this SDXL refiner"):
        lora.fit(only_base, config)
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="is a pickle"):
        lora.read(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="rank must be at least 1, found 0"):
        extract(base, base, tmp_path / "y", 0)


def test_a_partial_fit_is_told(tmp_path: Path) -> None:
    state = load_file(random_file(peers.SMALL_REFINER, tmp_path / "x.safetensors"))
    strange = {"unet.nowhere.lora_A.weight": torch.randn(4, 8), "unet.nowhere.lora_B.weight": torch.randn(8, 4)}
    save_file(state | strange, tmp_path / "y.safetensors")
    adapter = lora.fit(lora.read(tmp_path / "y.safetensors"), peers.SMALL_REFINER)
    assert adapter.missing == ["unet.nowhere"]
    assert "layers matched" in str(adapter)
    assert "1 not in this model: unet.nowhere" in str(adapter)


def test_a_third_factor_of_a_convolution() -> None:
    """kohya's lora_mid: a kernel between two 1x1 convolutions, against the three applied one after the other."""
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(s, generator=generator) for s in ((3, 6, 1, 1), (3, 3, 3, 3), (5, 3, 1, 1)))
    x = torch.randn(1, 6, 9, 9, generator=generator)
    f = torch.nn.functional.conv2d
    delta = lora.Factors(down, up, 3.0, mid).delta()
    assert peers.distance(f(x, delta, padding=1), f(f(f(x, down), mid, padding=1), up)) < 1e-6


def test_refine_with_adapters(
    small_refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture is that of a checkpoint with the adapters merged in; the settings tell of them."""
    from PIL import Image

    from sdxl_ref.cli import main

    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save("in.png")
    file = random_file(peers.SMALL_REFINER, tmp_path / "a.safetensors")
    merge(small_refiner_file, [(file, 0.5)], tmp_path / "merged.safetensors")
    common = ["refine", "in.png", "--prompt", "x", "--steps", "4", "--strength", "0.5", "--dtype", "float32"]
    plain = [*common, "--checkpoint", str(small_refiner_file)]
    assert main([*plain, "--out", "plain.png"]) == 0
    assert main([*plain, "--lora", f"{file}:0.5", "--out", "lora.png"]) == 0
    assert "a.safetensors at 0.5 on the refiner" in capsys.readouterr().out
    assert main([*common, "--checkpoint", "merged.safetensors", "--out", "merged.png"]) == 0
    pictures = {}
    for name in ("plain", "lora", "merged"):
        with Image.open(f"{name}.png") as picture:
            settings = json.loads(picture.text["sdxl_ref"])  # type: ignore[attr-defined]
            pictures[name] = torch.tensor(list(picture.convert("RGB").tobytes())).float()
        assert settings["lora"] == ([f"{file}:0.5"] if name == "lora" else [])
    assert (pictures["lora"] - pictures["merged"]).abs().max() <= 2  # merged weights are rounded to float16
    assert (pictures["lora"] - pictures["plain"]).abs().max() > 8
    assert main([*plain, "--lora", "none.safetensors", "--out", "x.png"]) == 2
    assert not Path("x.png").exists()


def test_generate_puts_an_adapter_on_whichever_model_it_fits(
    small_base_file: Path, small_refiner_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdxl_ref.cli import main

    only_base = {
        name: each
        for name, each in load_file(random_file(peers.SMALL_BASE, tmp_path / "all.safetensors")).items()
        if "transformer.text_model" in name
    }
    save_file(only_base, tmp_path / "base.safetensors")
    command = ["generate", "--base", str(small_base_file), "--refiner", str(small_refiner_file), "--prompt", "x"]
    command += ["--height", "64", "--width", "64", "--steps", "5", "--out", str(tmp_path / "o.png")]
    assert main([*command, "--lora", str(tmp_path / "base.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "on the base" in printed
    assert "on the refiner" not in printed
    assert main([*command, "--low-memory", "--lora", str(tmp_path / "base.safetensors")]) == 2
    assert "--lora changes weights that --low-memory drops" in capsys.readouterr().err
