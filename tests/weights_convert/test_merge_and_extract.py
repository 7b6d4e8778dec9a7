"""Adapters in the converter: merged, extracted, converted; against what they are on networks."""

from pathlib import Path

import peers
import pytest
import torch
from adapter_files import CONFIGS, TINY, networks, outputs, put_on, random_file
from cases import diagonal
from safetensors.torch import load_file, save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.adapters import convert_adapter, extract, merge

every_kind = pytest.mark.parametrize("kind", CONFIGS)
PLAIN = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"


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


@pytest.mark.parametrize(("kind", "form"), diagonal([*CONFIGS], [*FORMS]))
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
        put_on(parts, (adapter, 1.0))
        results.append(outputs(parts, config))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert peers.distance(a, b) <= 1e-5


@every_kind
def test_merged_weights_give_the_applied_adapters_outputs(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
    parts = networks(config)
    save_checkpoint(tmp_path / "model.safetensors", config, parts, torch.float32)
    files = [random_file(config, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    scales = (0.8, -0.3)
    adapters = list(zip(files, scales, strict=True))
    report = merge(tmp_path / "model.safetensors", adapters, tmp_path / "merged.safetensors")
    assert "tensors changed" in str(report)
    merged = open_checkpoint(tmp_path / "merged.safetensors")
    loaded = {part: merged.load(part) for part in prefixes(config)}
    put_on(parts, *((lora.fit(lora.read(f), config), s) for f, s in adapters))
    for a, b in zip(outputs(loaded, config), outputs(parts, config), strict=True):
        assert peers.distance(a, b) <= 1e-5


@every_kind
def test_extraction_at_full_rank_rebuilds_the_difference(kind: str, tmp_path: Path) -> None:
    config = TINY[kind]
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


def test_extraction_says_what_it_does_not_carry(tiny_refiner_file: Path, tmp_path: Path) -> None:
    """Biases, norms, embeddings and the VAE; the second file has no metadata, its shapes tell that it is a version."""
    state, second = load_file(tiny_refiner_file), tmp_path / "second.safetensors"
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
    told = str(extract(tiny_refiner_file, second, tmp_path / "out.safetensors", 4))
    assert "1 layers of rank at most 4" in told
    assert f"5 other tensors differ, which no adapter carries: {', '.join(others[:3])}, …" in told
    assert {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {"lora_unet_out_2"}
    save_file(state | changed | {carried: state[carried]}, second)
    with pytest.raises(InputError, match="there is nothing to extract; 5 other tensors differ"):
        extract(tiny_refiner_file, second, tmp_path / "none.safetensors", 4)
    save_file(state | {carried: changed[carried]}, second)
    told = str(extract(tiny_refiner_file, second, tmp_path / "again.safetensors", 4))
    assert told.endswith("0 other tensors differ, which no adapter carries")


def test_extraction_of_two_models(tiny_base_file: Path, tiny_refiner_file: Path, tmp_path: Path) -> None:
    message = r"no two versions of one model: in the second \d+ missing: .*; \d+ unexpected: "
    with pytest.raises(InputError, match=message):
        extract(tiny_base_file, tiny_refiner_file, tmp_path / "out.safetensors", 4)


def test_extraction_at_rank_0(tiny_base_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rank must be from 1 to 4096, found 0"):
        extract(tiny_base_file, tiny_base_file, tmp_path / "y", 0)


def test_a_merge_that_overflows_is_refused(tiny_refiner_file: Path, tmp_path: Path) -> None:
    file = random_file(peers.TINY_REFINER, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"would hold values that are not finite in torch.float16: use a lower scale"):
        merge(tiny_refiner_file, [(file, 1e7)], tmp_path / "merged.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
