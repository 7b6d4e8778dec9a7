"""One part of a model alone, in and out, in either layout; the peers open what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.layouts import part_rules, to_other
from sdxl_ref.weights.lone_parts import PREFIX_KEY
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.cli import main
from weights_convert.convert import convert

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def tensors_of(file: Path, part: str) -> dict[str, Tensor]:
    """A part of a file by the official names without a prefix."""
    prefix = prefixes(open_checkpoint(file).config)[part]
    return {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}


def peer(folder: Path, part: str) -> nn.Module:
    """The network that the part's own library makes of a folder."""
    import diffusers
    import transformers

    classes: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    network, info = classes[part].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return network  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_whole_model_is_written_alone(part: str, small_base_file: Path, tmp_path: Path) -> None:
    """In either layout; the peers open the folder with the model's own weights and sizes."""
    expected = tensors_of(small_base_file, part)
    convert(small_base_file, tmp_path / "a.safetensors", "official", part=part)
    assert_close(load_file(tmp_path / "a.safetensors"), expected, rtol=0, atol=0)
    convert(small_base_file, tmp_path / "part", "diffusers", part=part)
    _, rules = part_rules(part, open_checkpoint(small_base_file).config)
    theirs = peer(tmp_path / "part", part).state_dict()
    for name, tensor in to_other(rules, expected).items():
        found = theirs[name] if name in theirs else theirs[name.removeprefix("text_model.")]
        assert torch.equal(found, tensor.float()), name
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config.get("num_attention_heads", 2) in (2, 4)
    if part == "unet":
        assert config["attention_head_dim"] == [1, 2, 4]


@pytest.mark.parametrize("prefixed", [True, False], ids=["with its prefix", "bare"])
@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_one_part_goes_there_and_back(
    part: str, prefixed: bool, small_base_file: Path, tmp_path: Path
) -> None:
    """The same names, bits, dtypes and metadata; by the shapes alone, or where the metadata tell the sizes."""
    prefix = prefixes(open_checkpoint(small_base_file).config)[part] if prefixed else ""
    state = {prefix + key: value for key, value in tensors_of(small_base_file, part).items()}
    if part == "text_encoder":
        state[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    metadata = metadata_of(small_base_file) | {"modelspec.author": "a test"}
    save_file(state, tmp_path / "a.safetensors", metadata)
    convert(tmp_path / "a.safetensors", tmp_path / "part", "diffusers")
    peer(tmp_path / "part", part)
    convert(tmp_path / "part", tmp_path / "b.safetensors", "official")
    assert_close(load_file(tmp_path / "b.safetensors"), state, rtol=0, atol=0)
    assert metadata_of(tmp_path / "b.safetensors") == metadata
    convert(tmp_path / "part", tmp_path / "again", "diffusers")
    assert_same_files(tmp_path / "part", tmp_path / "again")


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_that_the_peer_wrote_goes_there_and_back(part: str, small_base_file: Path, tmp_path: Path) -> None:
    """With its own configuration: an edited field too, and weights in shards."""
    convert(small_base_file, tmp_path / "part", "diffusers", part=part)
    peer(tmp_path / "part", part).float().save_pretrained(tmp_path / "theirs", max_shard_size="300KB")  # type: ignore[operator]
    assert list((tmp_path / "theirs").glob("*.index.json"))
    if part == "vae":
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    convert(tmp_path / "theirs", tmp_path / "a.safetensors", "official")
    expected = {key: value.float() for key, value in tensors_of(small_base_file, part).items() if key != "logit_scale"}
    assert_close(load_file(tmp_path / "a.safetensors"), expected, rtol=0, atol=0)
    convert(tmp_path / "a.safetensors", tmp_path / "back", "diffusers")
    convert(tmp_path / "theirs", tmp_path / "copy", "diffusers")
    own = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == own
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    sizes = ("attention_head_dim", "num_attention_heads", "scaling_factor", "block_out_channels", "hidden_act")
    assert {name: own.get(name) for name in sizes} == {name: back.get(name) for name in sizes}


def test_a_file_without_metadata_is_converted_by_its_shapes(
    tiny_base_file: Path, small_base_file: Path, tmp_path: Path
) -> None:
    """What they do not tell is said."""
    for part, said in (
        ("vae", "note: no config.json: SDXL's scaling factor 0.13025 assumed"),
        ("text_encoder_2", "64 channels a head"),
    ):
        save_file(tensors_of(small_base_file, part), tmp_path / f"{part}.safetensors")
        report = str(convert(tmp_path / f"{part}.safetensors", tmp_path / part, "diffusers"))
        assert said in report
        (tmp_path / part / "config.json").unlink()
        convert(tmp_path / part, tmp_path / f"{part}.back.safetensors", "official")  # diffusers' names, by their shapes
        assert_close(
            load_file(tmp_path / f"{part}.back.safetensors"), tensors_of(small_base_file, part), rtol=0, atol=0
        )


def test_the_autoencoders_attention_as_matrices(small_base_file: Path, tmp_path: Path) -> None:
    state = tensors_of(small_base_file, "vae")
    matrices = {
        key: value[:, :, 0, 0].contiguous() if ".attn_1." in key and value.ndim == 4 else value
        for key, value in state.items()
    }
    save_file(matrices, tmp_path / "a.safetensors", metadata_of(small_base_file))
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "official")
    assert_close(load_file(tmp_path / "b.safetensors"), state, rtol=0, atol=0)


def test_open_clips_own_file_with_its_picture_tower(small_base_file: Path, tmp_path: Path) -> None:
    state = {f"text.{key}": value for key, value in tensors_of(small_base_file, "text_encoder_2").items()}
    state["logit_scale"] = state.pop("text.logit_scale")
    visual = {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(3, 1)}
    save_file(state | visual, tmp_path / "a.safetensors", metadata_of(small_base_file))
    convert(tmp_path / "a.safetensors", tmp_path / "part", "diffusers")
    assert list(load_file(tmp_path / "part" / EXTRAS_FILE)) == ["logit_scale"]
    assert metadata_of(tmp_path / "part" / "model.safetensors")[PREFIX_KEY] == "text."
    convert(tmp_path / "part", tmp_path / "b.safetensors", "official")
    assert_close(load_file(tmp_path / "b.safetensors"), state, rtol=0, atol=0)


# --- refused --------------------------------------------------------------------------------------------------------


def test_parts_that_are_refused(small_base_file: Path, small_refiner_file: Path, tmp_path: Path) -> None:
    vae = tensors_of(small_base_file, "vae")
    metadata = metadata_of(small_base_file)
    broken = {
        "missing": (
            {key: value for key, value in vae.items() if key != "encoder.conv_in.bias"},
            "1 missing: encoder.conv_in.bias",
        ),
        "strange": (vae | {"encoder.more": torch.zeros(1)}, "1 unexpected: encoder.more"),
        "shape": (vae | {"encoder.conv_in.bias": torch.zeros(7)}, "1 of another shape: encoder.conv_in.bias"),
    }
    for name, (state, message) in broken.items():
        save_file(state, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(InputError, match=f"looks like an SDXL autoencoder .* do not fit: {message}"):
            convert(tmp_path / f"{name}.safetensors", tmp_path / "out", "diffusers")
    save_file(vae, tmp_path / "vae.safetensors", metadata)
    for words, message in (
        ([small_refiner_file, "--part", "text_encoder"], "a refiner, has no text_encoder: expected one of unet, vae"),
        ([tmp_path / "vae.safetensors", "--part", "unet"], "is an SDXL autoencoder .*: it has no unet"),
        ([tmp_path / "vae.safetensors", "--vae", tmp_path / "vae.safetensors"], "go into a whole model"),
    ):
        source, *options = words
        with pytest.raises(InputError, match=message):
            convert(
                Path(source),
                tmp_path / "out",
                "diffusers",
                **{
                    str(option).removeprefix("--"): value
                    for option, value in zip(options[::2], options[1::2], strict=True)
                },
            )
    assert main(["convert", str(small_refiner_file), str(tmp_path / "out"), "--to", "official", "--part", "lora"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_part_does_not_replace_a_whole_model(small_base_file: Path, tmp_path: Path) -> None:
    convert(small_base_file, tmp_path / "model", "diffusers")
    with pytest.raises(InputError, match=r"is a whole model's folder: name .*/model/vae for this part"):
        convert(small_base_file, tmp_path / "model", "diffusers", part="vae", force=True)
    (tmp_path / "model" / "vae" / "README.md").write_text("mine")
    convert(small_base_file, tmp_path / "model" / "vae", "diffusers", part="vae", force=True, variant="fp16")
    names = {path.name for path in (tmp_path / "model" / "vae").iterdir()}
    assert names == {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"}
