"""Adapters of every kind in the converter: merged and converted as they act on networks, or refused by name."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import CONFIGS, networks, outputs, put_on, random_file
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.tensor_files import read_metadata
from weights_convert.adapters import convert_adapter, merge
from weights_convert.cli import main

PROJ_IN, TO_Q, CONV, NORM = (
    f"lora_unet_{name}"
    for name in (
        "middle_block_1_proj_in",
        "middle_block_1_transformer_blocks_0_attn1_to_q",
        "out_2",
        "middle_block_1_norm",
    )
)
TOWER = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def of_every_kind() -> dict[str, Tensor]:
    """LoHa with a kernel, LoKr, whole differences, and LyCORIS' DoRA on a block of a tower's stacked matrix."""
    loha = {f"{CONV}.hada_w{i}_{x}": noise(2, 4 if x == "a" else 32) for i in (1, 2) for x in "ab"}
    loha |= {f"{CONV}.hada_t{i}": noise(2, 2, 3, 3) for i in (1, 2)} | {f"{CONV}.alpha": torch.tensor(1.0)}
    lokr = {
        f"{PROJ_IN}.lokr_w1": noise(8, 8),
        f"{PROJ_IN}.lokr_w2_a": noise(16, 2),
        f"{PROJ_IN}.lokr_w2_b": noise(2, 16),
    }
    whole = {f"{NORM}.w_norm": noise(128), f"{NORM}.b_norm": noise(128), f"{CONV}.diff_b": noise(4)}
    whole |= {f"{TO_Q}.diff": noise(128, 128)}
    dora = {f"{TOWER}.lora_down.weight": noise(2, 64), f"{TOWER}.lora_up.weight": noise(64, 2)}
    return loha | lokr | whole | dora | {f"{TOWER}.alpha": torch.tensor(1.0), f"{TOWER}.dora_scale": noise(64, 1) + 1}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_file(of_every_kind(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_merged_is_what_acts_on_networks(kind: str, adapter: Path, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    parts = networks(config)
    save_checkpoint(tmp_path / "model.safetensors", config, parts, torch.float32)
    other = random_file(config, tmp_path / "other.safetensors")
    report = merge(tmp_path / "model.safetensors", [(adapter, 0.7), (other, 0.5)], tmp_path / "merged.safetensors")
    assert "relative error of the change, as float32 rounds it: " in str(report)
    merged = open_checkpoint(tmp_path / "merged.safetensors")
    loaded = {part: merged.load(part) for part in prefixes(config)}
    fitted = lora.load(adapter, config)
    assert fitted.is_whole
    put_on(parts, (fitted, 0.7), (lora.load(other, config), 0.5))
    for network in (*loaded.values(), *parts.values()):
        network.double()  # so that the weights alone are rounded
    for a, b in zip(outputs(loaded, config), outputs(parts, config), strict=True):
        assert peers.distance(a, b) <= 1e-6


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_conversion_keeps_every_kind(form: str, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(adapter, peers.SMALL_REFINER, tmp_path / "out.safetensors", form)
    state = load_file(tmp_path / "out.safetensors")
    assert {key.rpartition(".")[2] for key in state} == {key.rpartition(".")[2] for key in of_every_kind()}
    answers = []
    for path in (adapter, tmp_path / "out.safetensors"):
        parts = networks(peers.SMALL_REFINER)
        put_on(parts, (lora.load(path, peers.SMALL_REFINER), 0.7))
        answers.append(outputs(parts, peers.SMALL_REFINER))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_pefts_dora_goes_into_pefts_form_only(tmp_path: Path) -> None:
    layer = "unet.mid_block.attentions.0.proj_in"
    state = {f"{layer}.lora_A.weight": noise(2, 128), f"{layer}.lora_B.weight": noise(128, 2)}
    state[f"{layer}.lora_magnitude_vector"] = noise(128) + 1
    save_file(state, tmp_path / "x.safetensors")
    convert_adapter(tmp_path / "x.safetensors", peers.SMALL_REFINER, tmp_path / "y.safetensors", "peft")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    for form in FORMS.keys() - {"peft"}:
        with pytest.raises(InputError, match=f"is DoRA, which the form {form} cannot hold: expected peft"):
            convert_adapter(tmp_path / "x.safetensors", peers.SMALL_REFINER, tmp_path / "z.safetensors", form)


@pytest.mark.parametrize("form", ["official", "peft"])
@pytest.mark.parametrize(
    ("layer", "kind"), [(CONV, "LoHa"), (PROJ_IN, "LoKr"), (NORM, "a whole difference"), (TOWER, "DoRA")]
)
def test_what_a_form_has_no_place_for_is_refused_by_name(
    form: str, layer: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, small_refiner_file: Path
) -> None:
    state = {key: tensor for key, tensor in of_every_kind().items() if key.startswith(layer) and "diff_b" not in key}
    save_file(state, tmp_path / "x.safetensors")
    options = ["--model", str(small_refiner_file), "--form", form, "--out", str(tmp_path / "y.safetensors")]
    assert main(["lora", "convert", str(tmp_path / "x.safetensors"), *options]) == 2
    message = capsys.readouterr().err
    assert f" is {kind}" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "y.safetensors").exists()


# --- metadata -------------------------------------------------------------------------------------------------------

HOLDS = {
    "modelspec.title": "A title",
    "modelspec.author": "someone",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.trigger_phrase": "ohwx",
    "modelspec.tags": "a, b",
    "ss_tag_frequency": '{"a": {"b": 1}}',
    "ss_base_model_version": "sdxl_base_v1-0",
    "trained words": "ohwx",
}
GONE = {
    "modelspec.hash_sha256": "0x12",
    "sshs_model_hash": "12",
    "sshs_legacy_hash": "12",
    "ss_network_alpha": "4",
    "ss_network_module": "networks.lora",
    "lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 6}',
    "unet.use_rslora": "true",
    "lora_alpha": "6",
}


@pytest.mark.parametrize("form", FORMS)
def test_conversion_keeps_the_metadata_that_still_hold(form: str, tmp_path: Path) -> None:
    """And the scale, which metadata gave in the source, is not given twice."""
    layer = "unet.mid_block.attentions.0.proj_in"
    state = {f"{layer}.lora_A.weight": noise(3, 128), f"{layer}.lora_B.weight": noise(128, 3)}
    save_file(state, tmp_path / "x.safetensors", HOLDS | GONE | {"format": "pt"})
    report = convert_adapter(tmp_path / "x.safetensors", peers.SMALL_BASE, tmp_path / "y.safetensors", form)
    own = {"format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    assert read_metadata(tmp_path / "y.safetensors") == HOLDS | own
    assert f"metadata that no longer hold are left out: {', '.join(sorted(GONE))}" in str(report)
    [before], [after] = (lora.load(tmp_path / f"{name}.safetensors", peers.SMALL_BASE).layers.values() for name in "xy")
    assert peers.distance(before.delta(), 2 * noise(128, 3) @ noise(3, 128)) <= 1e-6
    assert peers.distance(after.delta(), before.delta()) <= 1e-6


# --- dtypes ---------------------------------------------------------------------------------------------------------


def merged(tmp_path: Path, dtype: torch.dtype, *options: str) -> Any:
    """Merge on the command line into a checkpoint of a dtype; the dtypes of the result, and the error of the change."""
    config = peers.TINY_REFINER
    save_checkpoint(tmp_path / "model.safetensors", config, networks(config), torch.float32)
    state = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", read_metadata(tmp_path / "model.safetensors"))
    file = random_file(config, tmp_path / "lora.safetensors")
    names = [str(tmp_path / "model.safetensors"), f"{file}:0.3", "--out", str(tmp_path / "merged.safetensors")]
    assert main(["lora", "merge", *names, *options]) == 0
    result = load_file(tmp_path / "merged.safetensors")
    lost = change = 0.0
    for place, own in lora.load(file, config).layers.items():
        key = prefixes(config)[place.part] + place.key
        delta = 0.3 * own.delta().reshape(state[key].shape)
        lost += float((result[key].double() - state[key].double() - delta.double()).square().sum())
        change += float(delta.square().sum())
    return {tensor.dtype for tensor in result.values()}, (lost / change) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32], ids=str)
def test_a_merge_says_how_much_of_the_change_its_dtype_rounds_away(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dtypes, error = merged(tmp_path, dtype)
    assert dtypes == {dtype}
    told = capsys.readouterr().out.splitlines()[-1]
    name = str(dtype).removeprefix("torch.")
    assert told.startswith(f"relative error of the change, as {name} rounds it: ")
    assert float(told.split(": ")[1]) == pytest.approx(error, rel=0.1)
    assert told.endswith("--dtype float16 keeps more of it") == (dtype.itemsize == 1)
    assert (error > 0.05) == (dtype.itemsize == 1)


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_another_dtype_keeps_the_change(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dtypes, error = merged(tmp_path, torch.float8_e4m3fn, "--dtype", name)
    assert dtypes == {getattr(torch, name)}
    assert error < 0.01
    assert f"as {name} rounds it" in capsys.readouterr().out
