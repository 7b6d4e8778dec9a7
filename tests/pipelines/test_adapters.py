"""Adapters on pipelines, by the calls that users know: any cell may run again, and what comes off leaves no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.adapters.places import matrices
from sdxl_ref.config import InputError
from sdxl_ref.weights.layouts import part_rules

RANK = 2
SMALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}


def write_adapter(path: Path, seed: int) -> Path:
    """An adapter for a base, in official names, on every seventh matrix of the UNet and of the second text encoder."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {part: part_rules(part, peers.TINY_BASE)[0] for part in ("unet", "text_encoder_2")}
    places = [(place, key) for place, key in matrices(peers.TINY_BASE).items() if place.part in shapes]
    state = {}
    for place, key in [(place, key) for place, key in places if place.count == 1 and not place.transposed][::7]:
        shape = shapes[place.part][place.key].shape
        if len(shape) == 2:
            name = key.removesuffix(".weight")
            state[f"{name}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.3
            state[f"{name}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.3
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "style.safetensors", 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "other.safetensors", 2)


def paint(pipe: Any) -> Tensor:
    size = {} if isinstance(pipe, ImageToImagePipeline) else {"height": 64, "width": 64}
    image = {"image": torch.zeros(1, 3, 64, 64), "strength": 0.5} if isinstance(pipe, ImageToImagePipeline) else {}
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipe("a cup", generator=generator, **SMALL, **size, **image).images
    return images


def base(base_file: Path, refiner_file: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(base_file)


def base_half(base_file: Path, refiner_file: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(base_file, dtype=torch.bfloat16)


def ensemble(base_file: Path, refiner_file: Path) -> EnsemblePipeline:
    return EnsemblePipeline.from_pretrained(base_file, refiner_file)


def ensemble_on_demand(base_file: Path, refiner_file: Path) -> EnsemblePipeline:
    return EnsemblePipeline.from_pretrained(base_file, refiner_file, low_memory=True)


@pytest.fixture(params=[base, base_half, ensemble, ensemble_on_demand], ids=lambda make: make.__name__)
def pipe(request: pytest.FixtureRequest, tiny_base_file: Path, tiny_refiner_file: Path) -> Any:
    make: Callable[[Path, Path], Any] = request.param
    return make(tiny_base_file, tiny_refiner_file)


def test_a_cell_may_run_three_times(pipe: Any, style: Path) -> None:
    first = paint(pipe)
    pictures = []
    for _ in range(3):
        pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters(["style"], [0.8])
        pictures.append(paint(pipe))
    assert not torch.equal(pictures[0], first)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert pipe.get_active_adapters() == ["style"]
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe), first)
    assert pipe.get_active_adapters() == []


def test_two_adapters_and_their_weights(pipe: Any, style: Path, other: Path) -> None:
    first = paint(pipe)
    pipe.load_lora_weights(str(style))
    pipe.load_lora_weights(str(other), "second")
    pipe.set_adapters(["style", "second"], [0.5, 0.25])
    both = paint(pipe)
    pipe.set_adapters("style", 0.5)
    alone = paint(pipe)
    pipe.set_adapters(["second", "style"], [0.25, 0.5])
    assert pipe.get_active_adapters() == ["second", "style"]
    assert torch.equal(paint(pipe), both)  # whatever the order
    assert not torch.equal(alone, both)
    pipe.set_adapters(["style", "second"], [0.0, 0.0])
    assert torch.equal(paint(pipe), first)


def test_before_and_after_offloading(tiny_base_file: Path, style: Path) -> None:
    plain = TextToImagePipeline.from_pretrained(tiny_base_file)
    first = paint(plain)
    plain.load_lora_weights(style)
    with_style = paint(plain)
    before = TextToImagePipeline.from_pretrained(tiny_base_file)
    before.load_lora_weights(style)
    before.enable_model_cpu_offload("cpu")
    after = TextToImagePipeline.from_pretrained(tiny_base_file)
    after.enable_model_cpu_offload("cpu")
    after.load_lora_weights(style)
    for pipe in (before, after):
        assert torch.equal(paint(pipe), with_style)
        pipe.unload_lora_weights()
        assert torch.equal(paint(pipe), first)


def test_parameters_are_what_runs(tiny_base_file: Path, style: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    names = [name for name, _ in pipe.unet.named_parameters()]
    before = {name: pipe.unet.get_parameter(name).clone() for name in names}
    pipe.load_lora_weights(style)
    changed = [name for name in names if not torch.equal(pipe.unet.get_parameter(name), before[name])]
    assert changed
    assert [name for name, _ in pipe.unet.named_parameters()] == names
    pipe.unload_lora_weights()
    assert all(torch.equal(pipe.unet.get_parameter(name), before[name]) for name in names)


def test_bad_calls(tiny_base_file: Path, tiny_refiner_file: Path, style: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    with pytest.raises(InputError, match="no adapter is loaded, found 'style': load one first"):
        pipe.set_adapters(["style"])
    pipe.load_lora_weights(style)
    with pytest.raises(InputError, match="unknown adapter 'stile': did you mean 'style'"):
        pipe.set_adapters(["stile"])
    with pytest.raises(InputError, match="expected one weight for each of 1 adapters, found 2"):
        pipe.set_adapters(["style"], [1.0, 2.0])
    with pytest.raises(InputError, match="must be a finite number"):
        pipe.set_adapters(["style"], float("nan"))
    with pytest.raises(InputError, match="could not read"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    assert pipe.get_active_adapters() == ["style"]
