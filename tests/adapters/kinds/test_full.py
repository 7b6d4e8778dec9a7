"""Whole differences against LyCORIS: weights, biases, norms; and beside factors, as ComfyUI extracts them."""

from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
from adapter_files import networks, put_on
from safetensors.torch import save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.kinds.full import Difference
from sdxl_ref.config import InputError


@pytest.mark.parametrize("kind", ["base", pytest.param("refiner", marks=pytest.mark.sweep)])
def test_it_gives_what_lycoris_gives(kind: str, as_lycoris_does: Callable) -> None:
    adapter = as_lycoris_does(kind, "full", train_norm=True)
    assert {type(change) for change in adapter.layers.values()} == {Difference}
    acted_on = {key.rpartition(".")[2] for _, key in adapter.changes}
    assert {"weight", "bias", "in_proj_bias", "in_proj_weight"} <= acted_on


def test_a_bias_beside_factors(tmp_path: Path) -> None:
    """ComfyUI extracts a matrix as factors and its bias whole."""
    layer = "diffusion_model.middle_block.1.proj_in"
    state = {f"{layer}.lora_down.weight": torch.randn(2, 128), f"{layer}.lora_up.weight": torch.randn(128, 2)}
    save_file(state | {f"{layer}.diff_b": torch.randn(128)}, tmp_path / "x.safetensors")
    adapter = lora.load(tmp_path / "x.safetensors", peers.SMALL_REFINER)
    unet = networks(peers.SMALL_REFINER)["unet"]
    before = {key: weight.clone() for key, weight in unet.state_dict().items()}
    put_on({"unet": unet}, (adapter, 0.5))
    changed = {key for key, weight in unet.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed == {"middle_block.1.proj_in.weight", "middle_block.1.proj_in.bias"}


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ({"diff": (128, 128), "w_norm": (128,)}, "holds two differences of one tensor"),
        ({"diff": (128, 128), "lora_down.weight": (2, 128), "lora_up.weight": (128, 2)}, "is both LoRA and a whole"),
        ({"diff": (128, 64)}, "1 of another shape: .* .128x64 for 128x128"),
        ({"diff_b": (64,)}, "1 of another shape: .*proj_in.bias .64 for 128"),
    ],
)
def test_refusals(ends: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    layer = "lora_unet_middle_block_1_proj_in"
    state = {f"{layer}.{end}": torch.ones(shape) for end, shape in ends.items()}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        lora.load(tmp_path / "x.safetensors", peers.SMALL_REFINER)
