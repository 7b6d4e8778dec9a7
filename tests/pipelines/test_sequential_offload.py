"""Weights that come to a device layer by layer. The device is the CPU here, and what comes is a copy."""

from pathlib import Path
from typing import Any

import pairs
import peers
import pytest
import torch
from pairs import SMALL, seeded
from torch import Tensor, nn

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import build_empty, prefixes
from sdxl_ref.weights.sequential_offload import SequentialOffload, blocks, own_tensors


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The data that came, each a copy."""
    came: list[Tensor] = []

    def fetch(self: SequentialOffload, data: Tensor) -> Tensor:
        came.append(data.clone())
        return came[-1]

    monkeypatch.setattr(SequentialOffload, "fetch", fetch)
    return came


def paint(pipe: Any, **changes: Any) -> Tensor:
    arguments = {**SMALL, "num_inference_steps": 2, "spacing": "trailing", "output_type": "pt"} | changes
    arguments["generator"] = seeded(0)
    images: Tensor = pipe("a cup", **arguments).images
    return images


def places(network: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in network.named_parameters()}


@pytest.mark.parametrize("config", [peers.SMALL_BASE, peers.SMALL_REFINER], ids=["base", "refiner"])
def test_the_blocks_have_every_tensor_once(config: Any) -> None:
    for part in prefixes(config):
        network = build_empty(part, config)
        tensors = [id(t) for *_, owners in blocks(network) for owner in owners for t in own_tensors(owner)]
        assert sorted(tensors) == sorted(id(t) for t in [*network.parameters(), *network.buffers()])
        assert len({path for path, *_ in blocks(network)}) > 5


def test_the_same_run_with_one_layer_at_a_time(tiny_base_file: Path, device: list[Tensor]) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    plain = paint(pipe)
    before = places(pipe.unet)
    parameters = dict(pipe.unet.named_parameters())
    pipe.enable_sequential_cpu_offload("cpu")
    most: list[int] = []
    inner = pipe.unet.middle_block[1].transformer_blocks[0].attn2.to_q  # type: ignore[index, union-attr]

    def look(*_: Any) -> None:
        now = places(pipe.unet)
        most.append(sum(now[name] != before[name] for name in now))

    inner.register_forward_pre_hook(look)
    assert torch.equal(paint(pipe), plain)
    assert most == [1, 1]  # of the UNet's weights, that layer's alone are there
    assert places(pipe.unet) == before  # and none stays
    assert all(parameters[name] is parameter for name, parameter in pipe.unet.named_parameters())
    assert isinstance(pipe.offload, SequentialOffload)
    assert pipe.offload.arrivals.count("unet.middle_block.1.transformer_blocks.0.attn2.to_q") == 2


def test_both_doors_of_the_autoencoder_and_every_block_comes(tiny_refiner_file: Path, device: list[Tensor]) -> None:
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    pipe.enable_sequential_cpu_offload("cpu")
    image = torch.zeros(1, 3, 64, 64)
    pipe("a cup", image=image, strength=0.5, num_inference_steps=2, output_type="pt")
    for part in prefixes(pipe.config):
        names = {f"{part}.{path}".rstrip(".") for path, *_ in blocks(getattr(pipe, part))}
        assert pipe.offload is not None
        assert names <= set(pipe.offload.arrivals)


def test_weights_go_home_where_a_layer_fails(tiny_base_file: Path, device: list[Tensor]) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    before = places(pipe.unet)
    pipe.enable_sequential_cpu_offload("cpu")
    with pytest.raises(RuntimeError):
        pipe.unet(torch.zeros(1, 5, 8, 8), torch.zeros(1), torch.zeros(1, 77, 96), torch.zeros(1, 1584))
    assert device
    assert places(pipe.unet) == before


def test_a_network_of_two_pipelines_comes_once(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    """Offloaded one by one, as model cards do, or as an ensemble."""
    base = TextToImagePipeline.from_pretrained(tiny_base_file)
    refiner = ImageToImagePipeline.from_pretrained(tiny_refiner_file, vae=base.vae)
    plain = paint(EnsemblePipeline(base, refiner), switch_step=1)
    base.enable_sequential_cpu_offload("cpu")
    refiner.enable_sequential_cpu_offload("cpu")
    assert torch.equal(paint(EnsemblePipeline(base, refiner), switch_step=1), plain)
    assert {len(block._forward_pre_hooks) for _, block, _ in blocks(base.vae)} == {1}


def test_what_is_refused(tiny_base_file: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    pipe.enable_sequential_cpu_offload("cpu")
    with pytest.raises(InputError, match="the parts come when they work already"):
        pipe.enable_model_cpu_offload("cpu")
    with pytest.raises(InputError, match="the parts come to a device when they work"):
        pipe.to("cpu")
    packed = TextToImagePipeline.from_pretrained(tiny_base_file)
    packed.pack()
    with pytest.raises(InputError, match=r"call pipe.unpack\(\) first"):
        packed.enable_sequential_cpu_offload("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so_and_goes_on() -> None:
    pipe = pairs.base()
    with pytest.warns(UserWarning, match="there is no cuda device: every part stays where it is") as record:
        pipe.enable_sequential_cpu_offload()
    assert record[0].filename == __file__
    assert pipe.offload is None
