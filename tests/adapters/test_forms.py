"""Forms of files: whatever is in the folder of forms is written, read again, and named in errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
from adapter_files import CONFIGS
from cases import diagonal
from safetensors.torch import save_file
from torch import Tensor

import sdxl_ref
from sdxl_ref.adapters import forms, lora, writing
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.places import Place, adapted_parts, matrices, module_of, places
from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.weights.checkpoint import build_empty
from sdxl_ref.weights.layouts import part_rules

MODELS = {**CONFIGS, "SDXL's base": BASE_1_0, "SDXL's refiner": REFINER_1_0}
WRITTEN = {  # what the three forms call some layers
    "kohya": {
        ("unet", "input_blocks.4.1.proj_in.weight"): "lora_unet_input_blocks_4_1_proj_in",
        ("unet", "out.2.weight"): "lora_unet_out_2",
        ("text_encoder", "text_model.encoder.layers.1.mlp.fc1.weight"): "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        ("text_encoder_2", "transformer.resblocks.1.mlp.c_fc.weight"): "lora_te2_text_model_encoder_layers_1_mlp_fc1",
        ("text_encoder_2", "text_projection"): "lora_te2_text_projection",
    },
    "peft": {
        ("unet", "input_blocks.4.1.proj_in.weight"): "unet.down_blocks.1.attentions.0.proj_in",
        ("unet", "out.2.weight"): "unet.conv_out",
        (
            "text_encoder",
            "text_model.encoder.layers.1.mlp.fc1.weight",
        ): "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        (
            "text_encoder_2",
            "transformer.resblocks.1.mlp.c_fc.weight",
        ): "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
        ("text_encoder_2", "text_projection"): "text_encoder_2.text_projection",
    },
    "official": {
        ("unet", "input_blocks.4.1.proj_in.weight"): "model.diffusion_model.input_blocks.4.1.proj_in",
        ("unet", "out.2.weight"): "model.diffusion_model.out.2",
        (
            "text_encoder",
            "text_model.encoder.layers.1.mlp.fc1.weight",
        ): "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1",
        (
            "text_encoder_2",
            "transformer.resblocks.1.mlp.c_fc.weight",
        ): "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc",
        ("text_encoder_2", "text_projection"): "conditioner.embedders.1.model.text_projection",
    },
}
ADDED = '''
"""A form that is in no list: names backwards."""

from collections.abc import Mapping
from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes


class Backwards(Form):
    name = "backwards"
    whose = ("nobody's",)
    suffixes: ClassVar[Suffixes] = {"down": ["first"], "up": ["second"], "alpha": ["third"]}

    def layout(self, part: str) -> Layout:
        return "official"

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        return [f"{part}!{layer[::-1]}"]


FORM = Backwards()
'''
USES_IT = """
import sys
import torch
from safetensors.torch import save_file
from sdxl_ref.adapters import lora, writing
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.places import Place
from sdxl_ref.config import REFINER_1_0, InputError

print("FORMS", *FORMS)
place = Place("unet", "out.2.weight")
adapter = lora.Adapter({place: Factors(torch.ones(1, 384, 3, 3), torch.ones(4, 1, 1, 1), 0.5)})
tensors = writing.tensors(adapter, REFINER_1_0, "backwards")
print("KEYS", *tensors)
save_file(tensors, "x.safetensors")
layers = lora.load("x.safetensors", REFINER_1_0).layers
assert torch.equal(layers[place].delta(), adapter.layers[place].delta())
save_file({"x": torch.ones(1)}, "y.safetensors")
for call in (lambda: writing.tensors(adapter, REFINER_1_0, "backward"), lambda: lora.read("y.safetensors")):
    try:
        call()
    except InputError as error:
        print("ERROR", error)
"""


def on_everything(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Adapter:
    """Random factors on every matrix and kernel of the UNet and the towers, of several ranks and alphas."""
    generator = torch.Generator().manual_seed(0)
    shapes = {part: build_empty(part, config).state_dict() for part in adapted_parts(config)}
    layers = {}
    for i, place in enumerate(matrices(config)):
        shape = place.block(shapes[place.part][place.key]).shape
        rank = 1 + i % 3
        down = torch.randn((rank, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator)
        layers[place] = Factors(down.to(dtype), up.to(dtype), 1.5 if i % 2 else float(rank))
    return Adapter(layers)


def whole_changes(adapter: Adapter, config: ModelConfig) -> dict[tuple[str, str], Tensor]:
    """What an adapter adds to each tensor of a model."""
    shapes = {part: build_empty(part, config).state_dict() for part in adapted_parts(config)}
    changes = {}
    for (part, key), layers in adapter.changes.items():
        changes[part, key] = torch.zeros(shapes[part][key].shape)
        lora.add(changes[part, key], torch.zeros_like(changes[part, key]), layers, 1.0)
    return changes


def test_the_folder_is_the_list() -> None:
    files = {path.stem for path in Path(forms.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == FORMS.keys() >= {"comfyui", "kohya", "official", "peft"}


def test_a_form_is_added_as_one_file(tmp_path: Path) -> None:
    """In a copy of the package: it is listed, written, read, and named in errors."""
    package = Path(sdxl_ref.__file__).parent
    shutil.copytree(
        package, tmp_path / "sdxl_ref", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "data")
    )
    (tmp_path / "sdxl_ref" / "adapters" / "forms" / "backwards.py").write_text(ADDED)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USES_IT]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    listed, keys, unknown, no_lora = result.stdout.splitlines()
    assert listed == f"FORMS {' '.join(sorted([*FORMS, 'backwards']))}"
    assert keys == "KEYS unet!2.tuo.first unet!2.tuo.second unet!2.tuo.third"
    assert unknown.endswith(
        "unknown form 'backward': did you mean 'backwards'? expected one of " + listed[6:].replace(" ", ", ")
    )
    whose = [name for form in FORMS.values() for name in form.whose]
    assert no_lora.endswith(f"is no LoRA in nobody's, {', '.join(whose)} or official names: found x")


@pytest.mark.parametrize(("kind", "form", "dtype"), diagonal([*CONFIGS], [*FORMS], [torch.float32, torch.float16]))
def test_an_adapter_on_everything_comes_back(kind: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    adapter = on_everything(config, dtype)
    tensors = writing.tensors(adapter, config, form)
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "x.safetensors", writing.metadata(config)
    )
    back = lora.load(tmp_path / "x.safetensors", config)
    assert back.is_whole
    expected = whole_changes(adapter, config)
    changes = whole_changes(back, config)
    assert changes.keys() == expected.keys()
    for key in expected:
        assert peers.distance(changes[key], expected[key]) <= 1e-6, key


@pytest.mark.parametrize(("kind", "form"), diagonal([*CONFIGS], [*FORMS]))
def test_a_change_of_a_stacked_matrix_comes_back(kind: str, form: str, tmp_path: Path) -> None:
    """Some tools adapt q, k and v as the one matrix that they are here."""
    config = CONFIGS[kind]
    place = Place("text_encoder_2", "transformer.resblocks.0.attn.in_proj_weight")
    adapter = Adapter({place: Factors(torch.randn(3, 64), torch.randn(192, 3), 1.0)})
    tensors = writing.tensors(adapter, config, form)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "x.safetensors")
    back = lora.load(tmp_path / "x.safetensors", config)
    [change] = whole_changes(back, config).values()
    [expected] = whole_changes(adapter, config).values()
    assert peers.distance(change, expected) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_spelling_of_every_layer_is_read(form: str, name: str) -> None:
    config = MODELS[name]
    place_of, _ = lora.places_by_name(config)
    for part, prefix in adapted_parts(config).items():
        _, rules = part_rules(part, config)
        for layer, place in places(part, rules).items():
            spellings = FORMS[form].spellings(part, prefix, layer)
            assert spellings
            assert {place_of[spelling] for spelling in spellings} == {place}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_has_one_written_name(form: str, name: str) -> None:
    """Blocks of a stacked matrix have one each, or one together."""
    config = MODELS[name]
    expected = {(place.part, place.key) for place in matrices(config)}
    named = set()
    for part in adapted_parts(config):
        names = writing.names_of(part, config, form)
        assert len(set(names.values())) == len(names)
        named |= {(part, place.key) for place in names}
    assert expected <= named


@pytest.mark.parametrize("form", FORMS)
def test_every_suffix_is_read(form: str, tmp_path: Path) -> None:
    down, up = torch.randn(2, 128, 1, 1), torch.randn(128, 2, 1, 1)
    factors = {"down": down, "up": up, "mid": torch.randn(2, 2, 1, 1), "alpha": torch.tensor(1.0)}
    layer = writing.names_of("unet", peers.SMALL_REFINER, form)[Place("unet", "middle_block.1.proj_in.weight")]
    for role, suffixes in FORMS[form].suffixes.items():
        for suffix in suffixes:
            keys = {other: FORMS[form].key(layer, other) for other in ("down", "up")} | {role: f"{layer}.{suffix}"}
            save_file({key: factors[own] for own, key in keys.items()}, tmp_path / "x.safetensors")
            [found] = lora.load(tmp_path / "x.safetensors", peers.SMALL_REFINER).layers.values()
            assert torch.equal(found.down, down)
            assert torch.equal(found.up, up)
            assert found.alpha == (1.0 if role == "alpha" else 2.0)
            assert (found.mid is not None) == (role == "mid")


@pytest.mark.parametrize("form", WRITTEN)
def test_names_that_are_written(form: str) -> None:
    for (part, key), expected in WRITTEN[form].items():
        assert writing.names_of(part, BASE_1_0, form)[Place(part, key, transposed=key == "text_projection")] == expected
    refiner = writing.names_of("text_encoder_2", REFINER_1_0, form)[
        Place("text_encoder_2", "text_projection", transposed=True)
    ]
    assert refiner == WRITTEN[form]["text_encoder_2", "text_projection"].replace("embedders.1", "embedders.0")


def test_a_third_factor_is_folded_in_where_a_form_has_none() -> None:
    place = Place("unet", "out.2.weight")
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(s, generator=generator) for s in ((3, 32, 1, 1), (3, 3, 3, 3), (4, 3, 1, 1)))
    adapter = Adapter({place: Factors(down, up, 3.0, mid)})
    for form in FORMS:
        tensors = writing.tensors(adapter, peers.SMALL_REFINER, form)
        written = [tensor for key, tensor in tensors.items() if key == FORMS[form].key(key.split(".lora")[0], "down")]
        assert [tuple(tensor.shape) for tensor in written] == [(3, 32, 3, 3)]


def test_a_form_that_there_is_not() -> None:
    adapter = Adapter({Place("unet", "out.2.weight"): Factors(torch.ones(1, 32, 3, 3), torch.ones(4, 1, 1, 1), 1.0)})
    message = f"unknown form 'koya': did you mean 'kohya'? expected one of {', '.join(FORMS)}"
    with pytest.raises(InputError) as error:
        writing.tensors(adapter, peers.SMALL_REFINER, "koya")
    assert str(error.value) == message


def test_the_metadata_say_which_model_it_is_for(tmp_path: Path) -> None:
    for kind, config in CONFIGS.items():
        assert writing.metadata(config)["modelspec.architecture"] == f"stable-diffusion-xl-v1-{kind}/lora"
    layer = f"unet.{module_of('out.2.weight')}"
    state = {f"{layer}.lora_A.weight": torch.ones(1, 32, 3, 3), f"{layer}.lora_B.weight": torch.ones(4, 1, 1, 1)}
    save_file(state, tmp_path / "x.safetensors", writing.metadata(peers.SMALL_BASE))
    lora.load(str(tmp_path / "x.safetensors"), peers.SMALL_BASE)
    with pytest.raises(InputError, match="was made for 'stable-diffusion-xl-v1-base/lora'"):
        lora.load(tmp_path / "x.safetensors", peers.SMALL_REFINER)
