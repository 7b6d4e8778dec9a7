"""DoRA against the two libraries that write it, at several scales: LyCORIS' dora_scale, PEFT's magnitude vector."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import CONFIGS, networks, outputs, put_on, unet_inputs, with_peft
from safetensors.torch import load_file, save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.kinds.dora import Magnitude
from sdxl_ref.config import InputError

ALGORITHMS: dict[str, dict[str, Any]] = {"locon": {}, "loha": {}, "lokr": {"factor": 4}}
TARGETS = ["to_q", "to_v", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


SAMPLE = [("locon", True), ("lokr", False)]
MARKS = {pair: [] if pair in SAMPLE else [pytest.mark.sweep] for pair in itertools.product(ALGORITHMS, (True, False))}


@pytest.mark.parametrize(("algo", "on_output"), [pytest.param(*pair, marks=marks) for pair, marks in MARKS.items()])
def test_it_gives_what_lycoris_gives(algo: str, on_output: bool, as_lycoris_does: Callable) -> None:
    adapter = as_lycoris_does("base", algo, weight_decompose=True, wd_on_out=on_output, **ALGORITHMS[algo])
    assert {type(change) for change in adapter.layers.values()} == {Magnitude}


@pytest.mark.sweep
def test_on_a_refiner(as_lycoris_does: Callable) -> None:
    as_lycoris_does("refiner", "locon", weight_decompose=True, use_tucker=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["base", pytest.param("refiner", marks=pytest.mark.sweep)])
def test_it_gives_what_peft_gives(kind: str, tmp_path: Path) -> None:
    """At each scale by its own rule, which is not LyCORIS'; with what diffusers saves, configurations in the header."""
    from diffusers import StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    config = CONFIGS[kind]
    parts: Any = networks(config)
    plain = outputs(parts, config)
    built = {
        "unet": with_peft(peers.diffusers_unet(parts["unet"]), TARGETS, use_dora=True),
        "text_encoder_2": with_peft(peers.transformers_openclip(parts["text_encoder_2"]), TEXT, use_dora=True),
    }
    if kind == "base":
        built["text_encoder"] = with_peft(peers.transformers_clip(parts["text_encoder"]), TEXT, use_dora=True)
    arguments: dict[str, Any] = {}
    for part, peer in built.items():
        for name, parameter in peer.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.1 * torch.randn(parameter.shape)
        arguments[f"{part}_lora_layers"] = get_peft_model_state_dict(peer)
        arguments[f"{part}_lora_adapter_metadata"] = peer.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **arguments)
    adapter = lora.load(tmp_path, config)
    assert adapter.is_whole
    assert {type(change) for change in adapter.layers.values()} == {Magnitude}
    tokens = torch.full((1, 77), 49407)
    tokens[0, 0] = 49406
    for scale in (1.0, -0.4):
        for peer in built.values():
            for module in peer.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", scale)
        second = built["text_encoder_2"](tokens, output_hidden_states=True)
        expected = [peers.call_diffusers_unet(built["unet"], *unet_inputs(config))]
        expected += [second.hidden_states[-2], second.text_embeds]
        if kind == "base":
            expected.append(built["text_encoder"](tokens, output_hidden_states=True).hidden_states[-2])
        put_on(parts, (adapter, scale))
        for ours, theirs, without in zip(outputs(parts, config), expected, plain, strict=True):
            assert peers.distance(ours, theirs) <= 1e-5
            assert peers.distance(without, theirs) > 1e-2
    put_on(parts)
    assert all(torch.equal(a, b) for a, b in zip(outputs(parts, config), plain, strict=True))


LAYER = "unet.mid_block.attentions.0.proj_in"
FACTORS = {f"{LAYER}.lora_A.weight": (2, 128), f"{LAYER}.lora_B.weight": (128, 2)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({f"{LAYER}.dora_scale": (128, 1)}, "has a magnitude and no factors"),
        (FACTORS | {f"{LAYER}.dora_scale": (64, 1)}, "1 of another shape"),
        (FACTORS | {f"{LAYER}.dora_scale": (128, 128)}, r"magnitudes of shape \(128, 128\), expected one side"),
        (FACTORS | {f"{LAYER}.dora_scale": (128, 1), f"{LAYER}.lora_magnitude_vector": (128,)}, "two magnitudes"),
    ],
)
def test_refusals(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        lora.load(tmp_path / "x.safetensors", peers.SMALL_REFINER)


def test_a_file_that_lost_its_magnitudes(tmp_path: Path) -> None:
    """PEFT would begin with those of the base: another picture."""
    save_file({key: torch.ones(shape) for key, shape in FACTORS.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}')
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    with pytest.raises(InputError, match=r"has no magnitude, and the adapter_config.json beside it says use_dora"):
        lora.load(tmp_path, peers.SMALL_REFINER)
