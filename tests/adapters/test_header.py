"""Adapters whose header names another model are refused, whatever layers match."""

from pathlib import Path

import peers
import pytest
from adapter_files import CONFIGS, random_file
from safetensors.torch import load_file, save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.header import check_model
from sdxl_ref.config import InputError

OF_A_BASE = [
    {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
    {"ss_base_model_version": "sdxl_base_v1-0"},
    {"ss_base_model_version": "sdxl_base_v0-9", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
]
OF_A_REFINER = [
    {"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"},
    {"ss_base_model_version": "sdxl_refiner_v1-0"},
]
OF_EITHER = [{}, {"ss_base_model_version": "sdxl_1.0"}, {"ss_base_model_version": "", "modelspec.architecture": ""}]
OF_OTHERS = [
    {"ss_base_model_version": "sd_v1"},
    {"ss_base_model_version": "sd_v2_768_v"},
    {"ss_base_model_version": "flux1"},
    {"ss_base_model_version": "sd3_m"},
    {"modelspec.architecture": "stable-diffusion-v1/lora"},
    {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
    {"modelspec.architecture": "flux-1-dev/lora"},
    {"modelspec.architecture": "stable-diffusion-xl-v1-inpaint/lora"},
    {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_base_model_version": "sd_v1"},
]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("metadata", [*OF_A_BASE, *OF_A_REFINER, *OF_EITHER, *OF_OTHERS], ids=str)
def test_the_model_that_a_header_names(metadata: dict[str, str], kind: str) -> None:
    is_for = metadata in OF_EITHER or metadata in {"base": OF_A_BASE, "refiner": OF_A_REFINER}[kind]
    if is_for:
        check_model(metadata, CONFIGS[kind])
        return
    with pytest.raises(InputError, match=r"the adapter was made for '.*', by its header's .*: expected .* for this"):
        check_model(metadata, CONFIGS[kind])


@pytest.mark.parametrize("metadata", OF_OTHERS, ids=str)
def test_an_adapter_of_another_model_is_not_loaded(metadata: dict[str, str], tmp_path: Path) -> None:
    state = load_file(random_file(peers.SMALL_BASE, tmp_path / "x.safetensors"))
    save_file(state, tmp_path / "x.safetensors")
    assert lora.load(tmp_path / "x.safetensors", peers.SMALL_BASE).is_whole
    save_file(state, tmp_path / "x.safetensors", metadata)
    with pytest.raises(InputError, match=f"^{tmp_path}/x.safetensors: the adapter was made for "):
        lora.load(tmp_path / "x.safetensors", peers.SMALL_BASE)
