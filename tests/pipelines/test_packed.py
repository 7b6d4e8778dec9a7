"""`pipe.pack()`: the same pictures by packed networks, of one pipeline, of two, and of those that are read late."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import random_file
from pairs import SMALL, seeded
from torch import Tensor

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import is_packed, why_not_here

LEVEL = 1 / 255
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def paint(pipe: Any, **changes: Any) -> Tensor:
    arguments = SMALL | {"num_inference_steps": 5, "output_type": "pt", "generator": seeded(0)} | changes
    images: Tensor = pipe("a cup", **arguments).images
    return images


@pytest.fixture
def base(tiny_base_file: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_base_file)


@pytest.fixture
def ensemble(tiny_base_file: Path, tiny_refiner_file: Path) -> EnsemblePipeline:
    return EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)


@pytest.fixture
def low_memory(tiny_base_file: Path, tiny_refiner_file: Path) -> EnsemblePipeline:
    return EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, low_memory=True)


def test_a_picture_of_packed_networks_is_the_plain_one(base: TextToImagePipeline) -> None:
    plain = paint(base)
    before = {part: dict(getattr(base, part).state_dict()) for part in PARTS}
    base.pack()
    assert all(is_packed(network) for network in (base.unet, base.text_encoder, base.text_encoder_2))
    assert float((paint(base) - plain).abs().max()) <= LEVEL
    base.pack()  # once more makes no difference
    base.unpack()
    for part in PARTS:
        assert all(torch.equal(tensor, before[part][key]) for key, tensor in getattr(base, part).state_dict().items())
    assert torch.equal(paint(base), plain)


@pytest.mark.skipif(
    bool(why_not_here({torch.bfloat16})), reason="this CPU has no kernels for bfloat16: packing was not tried in it"
)
def test_in_bfloat16_convolutions_are_packed_too(tiny_refiner_file: Path) -> None:
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, dtype=torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    options = {"image": torch.rand(1, 3, 64, 64, generator=seeded(1)), "strength": 0.9, "height": None, "width": None}
    call = {name: value for name, value in options.items() if value is not None}
    plain = pipe("a cup", num_inference_steps=5, output_type="pt", generator=seeded(0), **call).images
    pipe.pack()
    packed = pipe("a cup", num_inference_steps=5, output_type="pt", generator=seeded(0), **call).images
    assert all(is_packed(getattr(pipe, part)) for part in ("unet", "vae", "text_encoder_2"))
    assert peers.distance(packed, plain) <= 0.02


def test_an_ensemble_packs_both_models(ensemble: EnsemblePipeline) -> None:
    plain = paint(ensemble)
    ensemble.pack()
    assert all(is_packed(model.unet) for model in ensemble.models())
    assert float((paint(ensemble) - plain).abs().max()) <= LEVEL


def test_networks_that_are_read_when_they_work_are_packed_then(
    low_memory: EnsemblePipeline, ensemble: EnsemblePipeline
) -> None:
    plain = paint(ensemble)
    low_memory.pack()
    ensemble.pack()
    packed = paint(ensemble)
    for _ in range(2):
        assert torch.equal(paint(low_memory), packed)
    assert float((packed - plain).abs().max()) <= LEVEL
    low_memory.unpack()
    assert torch.equal(paint(low_memory), plain)


def test_adapters_on_a_packed_pipeline(base: TextToImagePipeline, tiny_base_file: Path, tmp_path: Path) -> None:
    """Before and after packing the same; taken off, the picture is what it was."""
    file = random_file(peers.TINY_BASE, tmp_path / "a.safetensors")
    base.pack()
    without = paint(base)
    base.load_lora_weights(file)
    after = paint(base)
    assert float((after - without).abs().max()) > 10 * LEVEL
    other = TextToImagePipeline.from_pretrained(tiny_base_file)
    other.load_lora_weights(file)
    plain = paint(other)
    other.pack()
    assert torch.equal(paint(other), after)
    assert float((plain - after).abs().max()) <= LEVEL
    base.unload_lora_weights()
    assert torch.equal(paint(base), without)


def test_where_one_network_cannot_be_packed_none_is(base: TextToImagePipeline) -> None:
    assert base.text_encoder is not None
    base.text_encoder.double()
    with pytest.raises(InputError, match=r"the pipeline cannot be packed: this CPU has no kernels for torch\.float64"):
        base.pack()
    assert not is_packed(base.unet)
    base.text_encoder.float()
    base.pack()
    with pytest.raises(InputError, match=r"a packed network cannot be moved to cpu and torch.bfloat16.*pipe.unpack"):
        base.to(torch.bfloat16)
    paint(base)


def test_networks_that_are_read_later_are_refused_at_once(
    low_memory: EnsemblePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the middle of a run."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
        with pytest.raises(InputError, match="cannot be packed: expected a CPU with AVX2 or AVX-512"):
            low_memory.pack()
    offload = low_memory.base.offload
    assert offload is not None
    assert not offload.packs
    monkeypatch.setattr(offload, "device", torch.device("cuda"))
    with pytest.raises(InputError, match="cannot be packed: its parts work on cuda"):
        low_memory.pack()
