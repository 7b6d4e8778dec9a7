"""What model cards call besides: parts shared between pipelines; calls that are not needed, or not there."""

from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pairs import SMALL, seeded

from sdxl_ref import DiffusionPipeline, EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import Defaults, InputError
from sdxl_ref.pipelines.other_calls import CALLS, INSTEAD, NOT_NEEDED

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def call(pipe: Any, **changes: Any) -> torch.Tensor:
    arguments = {**SMALL, "num_inference_steps": 2, "spacing": "trailing", "generator": seeded(0)} | changes
    latents: torch.Tensor = pipe("a cup", **arguments).images
    return latents


# --- the same networks in another pipeline ------------------------------------------------------------------------


def test_the_components_make_another_pipeline(tiny_base_file: Path) -> None:
    base = TextToImagePipeline.from_pretrained(tiny_base_file)
    base.defaults = Defaults(sampler="heun", spacing="trailing")
    other = ImageToImagePipeline(**base.components)
    for part in PARTS:
        assert getattr(other, part) is getattr(base, part)
    assert other.checkpoint is base.checkpoint
    assert other.defaults == base.defaults
    assert torch.equal(call(other), call(base))


def test_components_cannot_be_set() -> None:
    pipe = pairs.base()
    with pytest.raises(AttributeError):
        pipe.components = {}


def test_the_components_of_an_ensemble_are_its_pipelines() -> None:
    ensemble = pairs.ensemble()
    other = EnsemblePipeline(**ensemble.components)
    assert (other.base, other.refiner) == (ensemble.base, ensemble.refiner)


def test_from_pipe_shares_the_networks_and_keeps_the_rest(tiny_base_file: Path) -> None:
    base = TextToImagePipeline.from_pretrained(tiny_base_file)
    base.defaults = Defaults(sampler="heun")
    base.set_progress_bar_config(disable=True)
    base.enable_vae_tiling()
    base.enable_model_cpu_offload("cpu")
    other = ImageToImagePipeline.from_pipe(base)
    assert type(other) is ImageToImagePipeline
    assert {**vars(other), "_progress": None} == {**vars(base), "_progress": None}
    other.set_progress_bar_config(disable=False)
    assert base._progress["disable"] is True
    assert torch.equal(call(other), call(base))


def test_from_pipe_with_another_vae() -> None:
    base = pairs.base()
    vae = pairs.own_networks("small base")["vae"]
    other = TextToImagePipeline.from_pipe(base, vae=vae)
    assert other.vae is vae
    assert other.config.vae == vae.config != base.config.vae
    assert base.vae is not vae


def test_diffusion_pipeline_from_pipe_is_what_the_model_is() -> None:
    base = pairs.base()
    assert type(DiffusionPipeline.from_pipe(ImageToImagePipeline.from_pipe(base))) is TextToImagePipeline
    assert type(DiffusionPipeline.from_pipe(pairs.refiner())) is ImageToImagePipeline


@pytest.mark.parametrize(
    ("cls", "make", "parts", "message"),
    [
        (TextToImagePipeline, pairs.refiner, {}, "expected a base .* found an SDXL refiner"),
        (ImageToImagePipeline, pairs.ensemble, {}, "takes a pipeline of one model, found EnsemblePipeline"),
        (EnsemblePipeline, pairs.base, {}, r"two pipelines to EnsemblePipeline\(base, refiner\)"),
        (ImageToImagePipeline, dict, {}, "takes a pipeline of one model, found dict"),
        (ImageToImagePipeline, pairs.refiner, {"text_encoder": torch.nn.Linear(1, 1)}, "refiner has no text_encoder"),
        (ImageToImagePipeline, pairs.base, {"vae": "vae.safetensors"}, "expected vae to be a network"),
        (ImageToImagePipeline, pairs.base, {"torch_dtype": torch.float16}, r"call .to\(dtype\) for both"),
        (ImageToImagePipeline, pairs.base, {"unett": None}, "did you mean 'unet'|expected one of"),
    ],
)
def test_what_from_pipe_refuses(cls: Any, make: Any, parts: Any, message: str) -> None:
    with pytest.raises((InputError, TypeError), match=message):
        cls.from_pipe(make(), **parts)


# --- calls that change something, that are not needed, or that are not there --------------------------------------


def test_upcast_vae(tiny_base_file: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    pipe.upcast_vae()  # type: ignore[attr-defined]
    assert next(pipe.vae.parameters()).dtype == torch.float32
    assert pipe.dtype == torch.bfloat16


def test_vae_tiling_is_set_on_every_model() -> None:
    pipe: Any = pairs.ensemble()
    assert not pipe.base.tiles_vae
    pipe.enable_vae_tiling()
    assert pipe.base.tiles_vae
    assert pipe.refiner.tiles_vae
    pipe.disable_vae_tiling()
    assert not pipe.base.tiles_vae
    assert not pipe.refiner.tiles_vae


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_a_call_that_is_not_needed_says_why(name: str) -> None:
    with pytest.warns(UserWarning, match=f"^{name} is not needed and changes nothing: ") as record:
        getattr(pairs.base(), name)()
    assert record[0].filename == __file__


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_not_there_says_what_to_do(name: str) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(pairs.base(), name)
    assert str(error.value) == f"TextToImagePipeline has no {name}: {INSTEAD[name]}"


def test_the_tables_name_nothing_that_pipelines_have() -> None:
    """Else they would never be read."""
    own = {*dir(TextToImagePipeline), *dir(EnsemblePipeline), *vars(pairs.base())}
    assert not own & {*NOT_NEEDED, *INSTEAD, *CALLS}


def test_names_are_answered_with_the_nearest() -> None:
    pipe: Any = pairs.base()
    with pytest.raises(AttributeError, match="has no enable_vae_tilling: did you mean 'enable_vae_tiling'"):
        pipe.enable_vae_tilling()
    with pytest.raises(AttributeError, match="has no set_adapter: did you mean 'set_adapters'"):
        pipe.set_adapter("a")
    assert not hasattr(pipe, "__array__")


def test_a_call_that_is_not_needed_takes_its_arguments() -> None:
    pipe: Any = pairs.base()
    with pytest.warns(UserWarning, match="enable_attention_slicing is not needed"):
        pipe.enable_attention_slicing(slice_size="max")
