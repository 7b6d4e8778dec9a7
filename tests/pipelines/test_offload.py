"""Networks that come when they work: moved to a device, or read from their file; the same run, one set at a time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pairs import SMALL, seeded
from torch import Tensor, nn

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.weights.offload import Offload
from sdxl_ref.weights.opening import open_checkpoint

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
INNER = "middle_block.1.transformer_blocks.0.attn2"  # a module of the UNet under its official name


def paint(pipe: Any, **changes: Any) -> Tensor:
    arguments = SMALL | {"num_inference_steps": 5, "output_type": "pt", "generator": seeded(0)} | changes
    images: Tensor = pipe("a cup", **arguments).images
    return images


def is_there(network: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in network.parameters())


def networks(pipe: Any) -> dict[str, nn.Module]:
    """Every network of a pipeline or an ensemble once, named as in `Offload.arrivals`."""
    found: dict[nn.Module, str] = {}
    for model in pipe.models():
        for part in PARTS:
            network = getattr(model, part)
            if network is not None:
                found.setdefault(network, f"{model.config.kind} {part}")
    return {name: network for network, name in found.items()}


@pytest.fixture
def plain(tiny_base_file: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_base_file)


@pytest.fixture
def low_memory(tiny_base_file: Path, tiny_refiner_file: Path) -> EnsemblePipeline:
    return EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, low_memory=True)


@pytest.fixture
def moving(tiny_base_file: Path) -> TextToImagePipeline:
    """The device is the CPU here: nothing moves, but everything is called."""
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    pipe.enable_model_cpu_offload("cpu")
    return pipe


# --- the same run, one set of weights at a time -------------------------------------------------------------------


def test_each_part_moves_in_when_it_works_and_nothing_else_changes(
    plain: TextToImagePipeline, moving: TextToImagePipeline
) -> None:
    assert torch.equal(paint(plain), paint(moving))
    assert moving.offload is not None
    assert moving.offload.arrivals == ["text_encoder_2", "text_encoder", "unet", "vae"]


def test_low_memory_is_the_same_run_and_the_experts_change_places_once(
    low_memory: EnsemblePipeline, tiny_base_file: Path, tiny_refiner_file: Path
) -> None:
    plain = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    arguments = {"negative_prompt": "blurry", "sampler": "heun"}
    assert torch.equal(paint(plain, **arguments), paint(low_memory, **arguments))
    offload = low_memory.base.offload
    assert isinstance(offload, Offload)
    assert low_memory.refiner.offload is offload
    texts = ["base text_encoder_2", "base text_encoder", "refiner text_encoder_2"]
    assert offload.arrivals == [*texts, "base unet", "refiner unet", "base vae"]


def test_with_low_memory_one_network_has_weights_and_all_others_are_on_meta(low_memory: EnsemblePipeline) -> None:
    every = networks(low_memory)
    assert len(every) == 6  # the refiner uses the base's VAE
    assert not any(is_there(network) for network in every.values())
    seen: list[str] = []
    for name, network in every.items():

        def look(*_: Any, name: str = name) -> None:
            assert [other for other, network in every.items() if is_there(network)] == [name]
            if seen[-1:] != [name]:
                seen.append(name)

        for module in (network, *network.children()):  # an autoencoder is not called itself
            module.register_forward_hook(look)
    paint(low_memory)
    assert low_memory.base.offload is not None
    assert seen == low_memory.base.offload.arrivals


def test_a_second_run_reads_what_it_needs_again(low_memory: EnsemblePipeline) -> None:
    first = paint(low_memory)
    assert torch.equal(first, paint(low_memory))
    assert low_memory.base.offload is not None
    arrivals = low_memory.base.offload.arrivals
    assert arrivals[:6] == arrivals[6:]


def test_the_ensemble_moves_too_and_a_shared_part_once(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    pipe = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    pipe.refiner.text_encoder_2 = pipe.base.text_encoder_2
    plain = paint(pipe)
    pipe.enable_model_cpu_offload("cpu")
    assert torch.equal(paint(pipe), plain)
    assert pipe.base.offload is not None
    assert pipe.refiner.offload is pipe.base.offload
    # The refiner's text comes last: the encoder that both share moves in for the base, and again for it.
    assert pipe.base.offload.arrivals == ["text_encoder_2", "text_encoder", "text_encoder_2", "unet", "unet", "vae"]


def test_parts_that_both_pipelines_share_are_kept_once(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    """One pre-hook of the offload on each module, however many pipelines use the network."""
    pipe = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    assert pipe.refiner.vae is pipe.base.vae
    pipe.refiner.text_encoder_2 = pipe.base.text_encoder_2
    pipe.enable_model_cpu_offload("cpu")
    assert [len(network._forward_pre_hooks) for network in networks(pipe).values()] == [1] * 5


def test_calls_of_several_threads_take_turns(low_memory: EnsemblePipeline) -> None:
    """Each has the picture that it has alone, though one's network would drop the other's weights."""
    arguments = {"num_inference_steps": 2, "switch_step": 1}
    alone = [paint(low_memory, generator=seeded(i), **arguments) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda i: paint(low_memory, generator=seeded(i), **arguments), range(4))
        assert all(map(torch.equal, found, alone))


def test_a_turn_ends_where_a_network_cannot_be_read(tiny_refiner_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(tiny_refiner_file.read_bytes())
    offload = Offload("cpu")
    network = offload.read(open_checkpoint(file), "text_encoder_2", torch.float32)
    file.touch()
    with pytest.raises(InputError, match="has changed since it was opened"):
        network(torch.zeros(1, 77, dtype=torch.int64))
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: offload.turn.acquire(timeout=1)).result()


# --- networks stay what they are ----------------------------------------------------------------------------------


def names(pipe: Any) -> list[str]:
    return [name for name, _ in pipe.unet.named_modules()]


def test_names_of_modules_are_the_official_ones_before_and_after(
    plain: TextToImagePipeline, low_memory: EnsemblePipeline
) -> None:
    official = names(plain)
    assert INNER in official
    plain.enable_model_cpu_offload("cpu")
    assert names(plain) == official
    assert names(low_memory) == official
    paint(low_memory)
    assert names(low_memory) == official
    assert [name for name, _ in low_memory.unet.named_parameters()] == [n for n, _ in plain.unet.named_parameters()]


@pytest.mark.parametrize("how", ["moving", "low_memory"])
def test_a_users_hook_on_an_inner_module_fires(how: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(how)
    outputs: list[Tensor] = []
    pipe.unet.get_submodule(INNER).register_forward_hook(lambda module, args, output: outputs.append(output))
    paint(pipe, switch_step=4) if how == "low_memory" else paint(pipe)
    assert len(outputs) == (4 if how == "low_memory" else 5)
    assert not any(output.is_meta for output in outputs)


@pytest.mark.parametrize("how", ["moving", "low_memory"])
def test_a_users_hook_before_the_network_finds_its_weights(how: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(how)
    found: list[bool] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: found.append(is_there(module)))
    paint(pipe)
    assert found
    assert all(found)


def test_a_dtype_is_that_in_which_weights_are_read(low_memory: EnsemblePipeline) -> None:
    low_memory.to(torch.bfloat16)
    dtypes = set()
    low_memory.unet.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    paint(low_memory)
    assert dtypes == {torch.bfloat16}
    assert low_memory.base.dtype == low_memory.refiner.dtype == torch.bfloat16
    assert next(low_memory.vae.parameters()).dtype == torch.float32


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moving", "low_memory"])
def test_parts_that_come_cannot_be_moved_elsewhere(how: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(how)
    assert (pipe.base if how == "low_memory" else pipe).device == torch.device("cpu")
    with pytest.raises(InputError, match="the parts come to a device when they work"):
        pipe.to("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("pipeline", ["one", "two"])
def test_without_a_gpu_it_says_so_and_goes_on(pipeline: str, plain: TextToImagePipeline) -> None:
    pipe: Any = plain if pipeline == "one" else EnsemblePipeline(plain, pairs.refiner())
    with pytest.warns(UserWarning, match="there is no cuda device: every part stays where it is") as record:
        pipe.enable_model_cpu_offload()
    assert record[0].filename == __file__
    assert plain.offload is None


def test_a_refiner_alone(tiny_refiner_file: Path) -> None:
    """Both doors of the autoencoder: it encodes first, and decodes at the end."""
    offload = Offload("cpu")
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, offload=offload)
    image = torch.zeros(1, 3, 64, 64)
    arguments: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 4, "output_type": "pt"}
    found = pipe("a cup", **arguments, generator=seeded(0)).images
    plain = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    assert torch.equal(found, plain("a cup", **arguments, generator=seeded(0)).images)
    assert offload.arrivals == ["refiner vae", "refiner text_encoder_2", "refiner unet", "refiner vae"]
