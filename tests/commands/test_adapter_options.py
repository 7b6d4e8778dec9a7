"""`--lora` of the commands that make pictures."""

from pathlib import Path

import numpy as np
import peers
import pytest
from adapter_files import random_file
from command_line import pixels, settings
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_ref.cli import main
from sdxl_ref.weights.tensor_files import sha256_of
from weights_convert.adapters import merge


def test_refine_with_adapters(tiny_refiner_file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of a checkpoint with the adapters merged in; the settings tell of them."""
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save("in.png")
    file = random_file(peers.TINY_REFINER, here / "a.safetensors")
    merge(tiny_refiner_file, [(file, 0.5)], here / "merged.safetensors")
    common = ["refine", "in.png", "--prompt", "x", "--steps", "4", "--strength", "0.5", "--dtype", "float32"]
    plain = [*common, "--checkpoint", str(tiny_refiner_file)]
    assert main([*plain, "--out", "plain.png"]) == 0
    assert main([*plain, "--lora", f"{file}:0.5", "--out", "lora.png"]) == 0
    assert "a.safetensors at 0.5 on the refiner" in capsys.readouterr().out
    assert main([*common, "--checkpoint", "merged.safetensors", "--out", "merged.png"]) == 0
    pictures = {name: pixels(here / f"{name}.png").astype(int) for name in ("plain", "lora", "merged")}
    assert settings(here / "lora.png")["lora"] == [f"{file}:0.5"]
    assert settings(here / "plain.png")["lora"] == settings(here / "merged.png")["lora"] == []
    assert np.abs(pictures["lora"] - pictures["merged"]).max() <= 2  # merged weights are rounded to float16
    assert np.abs(pictures["lora"] - pictures["plain"]).max() > 8
    assert main([*plain, "--lora", "none.safetensors", "--out", "x.png"]) == 2
    assert not Path("x.png").exists()


def test_a_folder_by_peft(tiny_refiner_file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration in it counts; the settings have the hash of the file in it."""
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save("in.png")
    (here / "folder").mkdir()
    file = random_file(peers.TINY_REFINER, here / "folder" / "adapter_model.safetensors")
    common = ["refine", "in.png", "--prompt", "x", "--steps", "4", "--strength", "0.5"]
    common += ["--checkpoint", str(tiny_refiner_file), "--lora"]
    assert main([*common, f"{file}:2", "--out", "twice.png"]) == 0
    (here / "folder" / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    assert main([*common, "folder", "--out", "folder.png"]) == 0
    assert np.abs(pixels(here / "folder.png").astype(int) - pixels(here / "twice.png").astype(int)).max() <= 1
    assert settings(here / "folder.png")["lora_sha256"] == [sha256_of(file)]
    (here / "folder" / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6, "lora_bias": true}')
    capsys.readouterr()
    assert main([*common, "folder", "--out", "refused.png"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the adapter_config.json beside it asks for lora_bias=True: biases of the adapter's own" in message
    assert not Path("refused.png").exists()


def test_a_scale_that_is_no_number(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_file(peers.TINY_REFINER, here / "a.safetensors")
    Image.new("RGB", (64, 64)).save("in.png")
    assert main(["refine", "in.png", "--checkpoint", "pocket", "--prompt", "x", "--lora", "a.safetensors:1,5"]) == 2
    assert "scale of an adapter must be a number behind its file, found '1,5'" in capsys.readouterr().err


def test_generate_puts_an_adapter_on_whichever_model_it_fits(
    tiny_base_file: Path, tiny_refiner_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With low memory too, to the same bytes."""
    everything = load_file(random_file(peers.TINY_BASE, here / "all.safetensors"))
    only_base = {name: tensor for name, tensor in everything.items() if "transformer.text_model" in name}
    save_file(only_base, "base.safetensors")
    command = ["generate", "--base", str(tiny_base_file), "--refiner", str(tiny_refiner_file), "--prompt", "x"]
    command += ["--height", "64", "--width", "64", "--steps", "5"]
    assert main([*command, "--out", "plain.png"]) == 0
    capsys.readouterr()
    for name, options in (("lora.png", []), ("low.png", ["--low-memory"])):
        assert main([*command, *options, "--out", name, "--lora", "base.safetensors"]) == 0
        printed = capsys.readouterr().out
        assert "on the base" in printed
        assert "on the refiner" not in printed
    assert not np.array_equal(pixels(here / "lora.png"), pixels(here / "plain.png"))
    assert (here / "lora.png").read_bytes() == (here / "low.png").read_bytes()
