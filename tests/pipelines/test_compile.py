"""`pipe.unet = torch.compile(pipe.unet, …)`, as the model card writes it, and what `--compile` does."""

from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pairs import seeded

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.pipelines.compiled import compile_networks, try_compiler

COMPILED = 1e-5  # relative, float32: fused kernels sum in another order


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"backend": "eager"}, id="the graph"),
        pytest.param({"mode": "reduce-overhead"}, id="the card's line", marks=pytest.mark.sweep),  # a minute
    ],
)
def test_the_unet_is_one_graph_compiled_once_for_a_run(how: dict[str, Any]) -> None:
    """Without a graph break and without a recompilation, and the numbers are the same."""
    from torch._dynamo.utils import counters

    pipe = pairs.refiner()
    arguments = {"image": torch.zeros(1, 3, 64, 64), "num_inference_steps": 8, "strength": 0.5}
    arguments |= {"output_type": "latent"}
    plain = pipe("a cup", generator=seeded(0), **arguments).images
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **how)
    compiled = pipe("a cup", generator=seeded(0), **arguments).images
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert float((compiled - plain).norm() / plain.norm()) <= COMPILED


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_networks_are_compiled_once_for_all_sizes(
    backend: str, tiny_refiner_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--compile` does: pictures of three shapes, the first a square, go through the same three graphs.

    None is under 128 pixels: PyTorch has other kernels for a single picture that is that small, and compiles anew.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    arguments = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    images = [torch.rand(2, 3, *size, generator=seeded(1)) for size in ((128, 128), (192, 128), (128, 160))]
    plain = [pipe("a cup", image=image, generator=seeded(0), **arguments).images for image in images]
    torch._dynamo.reset()
    counters.clear()
    compile_networks([pipe], backend)
    for image, picture in zip(images, plain, strict=True):
        compiled = pipe("a cup", image=image, generator=seeded(0), **arguments).images
        assert float((compiled - picture).norm() / picture.norm()) <= COMPILED
    assert counters["stats"]["unique_graphs"] == 3  # UNet, encoder, decoder
    assert not counters["graph_break"]


def test_what_cannot_be_compiled_is_said(
    tiny_refiner_file: Path, tiny_base_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    pipe.pack()
    with pytest.raises(InputError, match="packed networks cannot be compiled: call unpack first"):
        compile_networks([pipe])
    pipe.unpack()
    ensemble = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, low_memory=True)
    with pytest.raises(InputError, match="networks that are read when they work cannot be compiled"):
        compile_networks([pipe, *ensemble.models()])
    assert pipe.unet._compiled_call_impl is None
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"nothing can be compiled for cpu here: .*[Cc]ompiler"):
        try_compiler(torch.device("cpu"))
