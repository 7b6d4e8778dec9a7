"""Adapters: every form against the library that writes it, on diffusers' and transformers' own networks."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import CONFIGS, kohya, networks, peft_state, put_on, random_file, unet_inputs, with_peft
from cases import diagonal
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.places import module_of
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights import layouts

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "conv_in"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1", "text_projection"]


@pytest.mark.parametrize(
    ("kind", "convolutions", "form"),
    diagonal([*CONFIGS], [False, True], ["peft", "kohya", "kohya official", "old diffusers"]),
)
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
        official = {module_of(r.other[0]): module_of(r.official) for r in rules}
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
    before = unet(*inputs)
    put_on({"unet": unet}, (adapter, 1.0))
    found = unet(*inputs)
    assert peers.distance(found, expected) <= 1e-5
    assert peers.distance(before, expected) > 1e-2
    put_on({"unet": unet})
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
    put_on(parts, (adapter, 1.0))
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
    put_on(parts, (lora.fit(found, peers.SMALL_BASE), 1.0))
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


def test_refusals(tmp_path: Path) -> None:
    config = peers.SMALL_REFINER
    path = tmp_path / "x.safetensors"

    def refused(state: dict[str, Tensor], message: str, config: ModelConfig = config) -> None:
        save_file(state, path)
        with pytest.raises(InputError, match=message):
            lora.fit(lora.read(path), config)

    good = "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    refused({"weight": up}, "is no LoRA in ComfyUI's, kohya's, PEFT's, diffusers' or official names: found weight")
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
    delta = Factors(down, up, 3.0, mid).delta()
    assert peers.distance(f(x, delta, padding=1), f(f(f(x, down), mid, padding=1), up)) < 1e-6


COMFY = "clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj"
OFFICIAL_TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
SECOND = "transformer.resblocks.1.mlp.c_fc.weight"


@pytest.mark.parametrize("end", ["lora_down.weight", "lora_A.weight"])
@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("mid_block.attentions.0.proj_in", "unet", "middle_block.1.proj_in"),
        (OFFICIAL_TO_Q, "unet", OFFICIAL_TO_Q),
        (f"diffusion_model.{OFFICIAL_TO_Q}", "unet", OFFICIAL_TO_Q),
        (f"model.diffusion_model.{OFFICIAL_TO_Q}", "unet", OFFICIAL_TO_Q),
        ("lycoris_mid_block_attentions_0_proj_in", "unet", "middle_block.1.proj_in"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet", "middle_block.1.proj_in"),
        (COMFY, "text_encoder", "text_model.encoder.layers.1.self_attn.q_proj"),
        (f"text_encoders.{COMFY}", "text_encoder", "text_model.encoder.layers.1.self_attn.q_proj"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", "text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
        ("lora_te1_encoder_layers_1_mlp_fc1", "text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
        ("text_encoder.encoder.layers.1.mlp.fc1", "text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
        ("lora_te2_encoder_layers_1_mlp_fc1", "text_encoder_2", SECOND),
        ("text_encoder_2.encoder.layers.1.mlp.fc1", "text_encoder_2", SECOND),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1", "text_encoder_2", SECOND),
        ("clip_g.transformer.encoder.layers.1.mlp.fc1", "text_encoder_2", SECOND),
        ("text_encoders.clip_g.transformer.text_projection", "text_encoder_2", "text_projection"),
    ],
)  # fmt: skip
def test_the_names_of_the_wild(name: str, part: str, key: str, end: str, tmp_path: Path) -> None:
    """Without a part they are the UNet's; the towers with and without `text_model`; ComfyUI's and LyCORIS' own."""
    key = key if key.endswith(("weight", "text_projection")) else f"{key}.weight"
    shapes = {(place.part, place.key): shape for place, shape in lora.places_by_name(peers.SMALL_BASE)[1].items()}
    shape = shapes[part, key]
    other = {"lora_down.weight": "lora_up.weight", "lora_A.weight": "lora_B.weight"}[end]
    state = {f"{name}.{end}": torch.ones(2, shape[1]), f"{name}.{other}": torch.ones(shape[0], 2)}
    save_file(state, tmp_path / "x.safetensors")
    [found] = lora.load(tmp_path / "x.safetensors", peers.SMALL_BASE).layers
    assert (found.part, found.key) == (part, key)
