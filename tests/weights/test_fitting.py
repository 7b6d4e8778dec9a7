"""A checkpoint opens only where its parts fit each other; which does not is told in one line, wherever it is opened."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
from checkpoints import BASE, CLIP, FIRST, OPENCLIP, REFINER, error_of, expected_shapes, metadata, sparse_file
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sdxl_ref.cli import main
from sdxl_ref.config import BASE_1_0, REFINER_1_0, ModelConfig
from sdxl_ref.weights.file_saving import write_text
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.opening import POCKET
from sdxl_ref.weights.stated_config import misfit
from weights_convert.cli import main as convert_main
from weights_convert.convert import convert


def changed(config: ModelConfig, part: str, **sizes: Any) -> ModelConfig:
    """With other sizes of a part ("unet", "vae", "clip_l" or "bigg"), and the others as they are."""
    if part in ("unet", "vae"):
        return replace(config, **{part: replace(getattr(config, part), **sizes)})
    towers = list(config.text_encoders)
    at = 0 if part == "clip_l" else -1
    towers[at] = replace(towers[at], **sizes)
    return replace(config, text_encoders=tuple(towers))


VARIANTS = {  # every one of them is a model whose tensors are those of its own configuration
    "an inpainting UNet": (changed(BASE, "unet", in_channels=9), "an inpainting model"),
    "an editing UNet": (changed(BASE, "unet", in_channels=8), "an editing model"),
    "a UNet that reads depth": (changed(REFINER, "unet", in_channels=5), "expected (4, 4), found (5, 4)"),
    "a UNet that predicts variances": (changed(BASE, "unet", out_channels=8), "expected (4, 4), found (4, 8)"),
    "a UNet of 16 latent channels": (
        changed(REFINER, "unet", in_channels=16, out_channels=16),
        "expected (4, 4), found (16, 16)",
    ),
    "a VAE of 16 latent channels": (
        changed(BASE, "vae", embed_dim=16, z_channels=16),
        "channels of the VAE: expected (4, 3, 3), found (16, 3, 3)",
    ),
    "UNet and VAE of 16 channels": (
        changed(changed(BASE, "vae", embed_dim=16, z_channels=16), "unet", in_channels=16, out_channels=16),
        "expected (4, 4), found (16, 16)",
    ),
    "a VAE that reads transparency": (changed(REFINER, "vae", in_channels=4), "found (4, 4, 3)"),
    "a VAE that makes transparency": (changed(REFINER, "vae", out_ch=4), "found (4, 3, 4)"),
    "a context of another width": (
        changed(REFINER, "unet", context_dim=128),
        "width of the text context: expected 64, found 128",
    ),
    "a base's UNet that reads bigG alone": (changed(BASE, "unet", context_dim=64), "expected 192, found 64"),
    "a base's UNet with a refiner's vector": (
        changed(BASE, "unet", adm_in_channels=48 + 5 * 256),
        f"width of the vector: expected {48 + 6 * 256}, found {48 + 5 * 256}",
    ),
    "a vector of another pooled width": (
        changed(REFINER, "bigg", embed_dim=64),
        f"width of the vector: expected {64 + 5 * 256}, found {48 + 5 * 256}",
    ),
    "a wider bigG": (changed(REFINER, "bigg", width=128, heads=2), "width of the text context: expected 128, found 64"),
    "a narrower CLIP-L": (changed(BASE, "clip_l", width=64, heads=1), "expected 128, found 192"),
    "a small vocabulary of bigG": (changed(REFINER, "bigg", vocab_size=96), "vocabularies: expected {49408}"),
    "a large vocabulary of CLIP-L": (changed(BASE, "clip_l", vocab_size=49410), "vocabularies: expected {49408}"),
    "a long context of bigG": (
        changed(REFINER, "bigg", context_length=248),
        "context lengths: expected {77}, found {248}",
    ),
    "a short context of CLIP-L": (changed(BASE, "clip_l", context_length=64), "context lengths: expected {77}"),
    "a third text encoder": (
        replace(BASE, text_encoders=(CLIP, OPENCLIP, OPENCLIP), unet=replace(BASE.unet, context_dim=128 + 64 + 64)),
        "text encoders: expected one (a refiner) or two (a base), found 3",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_that_do_not_fit_each_other(name: str, tmp_path: Path) -> None:
    """Whether the metadata tell the sizes or the shapes do."""
    config, message = VARIANTS[name]
    shapes = expected_shapes(config)
    shapes |= {key.replace("embedders.2.", "embedders.1."): shape for key, shape in shapes.items()}  # where there are 3
    for texts in (metadata(config), None):
        path = sparse_file(tmp_path / "a.safetensors", shapes, texts)
        line = error_of(path)
        assert line.startswith(f"{path} ")
        assert message in line
        assert "\n" not in line


def test_every_kind_of_misfit_is_told_at_once() -> None:
    config = changed(changed(BASE, "unet", in_channels=9), "bigg", vocab_size=5)
    assert misfit(config).count(";") == 1


@pytest.mark.parametrize("config", [REFINER_1_0, BASE_1_0, REFINER, BASE, peers.SMALL_REFINER, peers.TINY_BASE])
def test_what_fits(config: ModelConfig) -> None:
    assert misfit(config) == ""


@pytest.mark.parametrize(("kind", "channels"), [("base", 9), ("base", 8), ("refiner", 5)])
def test_a_model_of_official_sizes_with_more_channels(kind: str, channels: int, tmp_path: Path) -> None:
    """As the published inpainting and editing models are: everything else is the official base's."""
    config = {"refiner": REFINER_1_0, "base": BASE_1_0}[kind]
    shapes = expected_shapes(config)
    out, _, *kernel = shapes[FIRST]
    line = error_of(sparse_file(tmp_path / "a.safetensors", shapes | {FIRST: (out, channels, *kernel)}))
    assert f"channels into and out of the UNet: expected (4, 4), found ({channels}, 4)" in line
    assert ("inpainting" in line) is (channels == 9)


# --- wherever a model is opened -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An inpainting model as a file and as a folder, whose UNet's configuration is diffusers' own; and a ControlNet."""
    folder = tmp_path_factory.mktemp("models")
    config = changed(BASE, "unet", in_channels=9)
    file = sparse_file(folder / "inpainting.safetensors", expected_shapes(config), metadata(config))
    convert(POCKET["pocket-base"], folder / "inpainting", "diffusers")
    unet = folder / "inpainting" / "unet"
    fields = {key: value for key, value in read_json(unet / "config.json").items() if not key.startswith("_")}
    peer = UNet2DConditionModel(**fields | {"in_channels": 9})
    peer.save_config(unet)
    save_file(peer.state_dict(), unet / "diffusion_pytorch_model.safetensors")
    shapes = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}
    controlnet = sparse_file(folder / "controlnet.safetensors", shapes)
    return {"an inpainting model": file, "an inpainting model, ": folder / "inpainting", "a ControlNet": controlnet}


COMMANDS = {
    "generate": (main, ["generate", "--prompt", "a cup", "--steps", "1", "--out", "OUT.png", "--base", "MODEL"]),
    "generate, as the refiner": (
        main,
        ["generate", "--prompt", "a", "--base", "pocket", "--out", "OUT.png", "--refiner", "MODEL"],
    ),
    "refine": (main, ["refine", "PHOTO", "--prompt", "a", "--out", "OUT.png", "--checkpoint", "MODEL"]),
    "train": (main, ["train", "--data", "DATA", "--out", "OUT", "--steps", "1", "--checkpoint", "MODEL"]),
    "info": (main, ["info", "MODEL"]),
    "verify": (convert_main, ["verify", "MODEL"]),
    "inspect": (convert_main, ["inspect", "MODEL"]),
    "convert": (convert_main, ["convert", "MODEL", "OUT", "--to", "official"]),
    "diff": (convert_main, ["diff", "MODEL", "MODEL"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_another_model_is(
    command: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = COMMANDS[command]
    photo = Path(__file__).parents[2] / "sdxl_ref" / "data" / "photo.jpg"
    (tmp_path / "DATA").mkdir()
    shutil.copy(photo, tmp_path / "DATA")
    write_text(tmp_path / "DATA" / "metadata.jsonl", '{"file_name": "photo.jpg", "text": "a"}\n')
    places = {"PHOTO": photo, "DATA": tmp_path / "DATA", "OUT": tmp_path / "OUT", "OUT.png": tmp_path / "OUT.png"}
    for what, model in models.items():
        assert run([str({**places, "MODEL": model}.get(word, word)) for word in words]) == 2
        error = capsys.readouterr().err
        assert what.removesuffix(", ") in error
        assert str(model) in error
        assert error.count("\n") == 1
        assert not (tmp_path / "OUT.png").exists()
