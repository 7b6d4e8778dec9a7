"""Checkpoints loaded: bit-equal round trips, dtypes, `logit_scale`, hashes, and one copy in memory."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import sample
from checkpoints import (
    CONFIGS,
    LOGIT_SCALE,
    OPENCLIP,
    REFINER,
    error_of,
    kinds,
    listed_shapes,
    metadata,
    parts_of,
    released,
    sparse_file,
    write,
)
from command_line import Refine, pixels, settings
from safetensors.torch import load_file
from torch import Tensor

from sdxl_ref.cli import main
from sdxl_ref.config import REFINER_1_0, InputError
from sdxl_ref.pipelines import TextToImagePipeline
from sdxl_ref.pipelines.pipeline import Pipeline
from sdxl_ref.weights.checkpoint import build_empty
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.identity import KNOWN_FILES, vae_name
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from weights_convert.convert import convert


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_comes_back_bit_by_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    path = tmp_path / "a.safetensors"
    parts = parts_of(config)
    save_checkpoint(path, config, parts, dtype)
    found = open_checkpoint(path)
    assert found.config == config
    assert found.note == ""
    for part, network in parts.items():
        saved = network.state_dict()
        loaded = found.load(part, dtype)
        assert not loaded.training
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
        assert list(loaded.state_dict()) == list(saved)
        for key, tensor in loaded.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, saved[key].to(dtype)), key


def test_the_keys_in_a_file_are_the_official_ones(files: dict[str, Path], state: dict[str, Tensor]) -> None:
    parts = parts_of(REFINER)
    for prefix, part in (
        ("model.diffusion_model.", "unet"),
        ("first_stage_model.", "vae"),
        ("conditioner.embedders.0.model.", "text_encoder_2"),
    ):
        assert {key for key in state if key.startswith(prefix)} == {prefix + key for key in parts[part].state_dict()}
    base = open_checkpoint(files["base"]).shapes
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in base
    assert "conditioner.embedders.1.model.ln_final.weight" in base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loading_casts(files: dict[str, Path], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    vae = open_checkpoint(files["refiner"]).load("vae", dtype)
    for key, tensor in vae.state_dict().items():
        assert torch.equal(tensor, state["first_stage_model." + key].to(dtype))


def test_a_loaded_part_runs(files: dict[str, Path]) -> None:
    """On the same input, to the same bits as the network that was saved."""
    z = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    saved: Any = parts_of(REFINER)["vae"].eval()
    loaded: Any = open_checkpoint(files["refiner"]).load("vae")
    with torch.no_grad():
        assert torch.equal(loaded.decode(z), saved.decode(z))


def test_an_empty_build_takes_no_memory_and_no_randomness() -> None:
    before = torch.get_rng_state()
    network = build_empty("unet", REFINER_1_0)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@kinds
def test_a_missing_logit_scale_is_the_logarithm_of_100(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files[kind])
    del state[LOGIT_SCALE[kind]]
    for name, texts in (("with.safetensors", metadata(CONFIGS[kind])), ("without.safetensors", None)):
        found = open_checkpoint(write(tmp_path / name, state, texts))
        scale = found.load("text_encoder_2").state_dict()["logit_scale"]
        assert scale.item() == pytest.approx(math.log(100))
        assert found.load("text_encoder_2", torch.float16).state_dict()["logit_scale"].dtype == torch.float16


def test_a_logit_scale_in_the_file_is_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    state[LOGIT_SCALE["refiner"]] = torch.tensor(1.25)
    found = open_checkpoint(write(tmp_path / "a.safetensors", state, metadata()))
    assert found.load("text_encoder_2").state_dict()["logit_scale"] == 1.25


# --- hashes -------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_file_and_of_its_vae(files: dict[str, Path], state: dict[str, Tensor]) -> None:
    found = open_checkpoint(files["refiner"])
    assert found.sha256() == hashlib.sha256(files["refiner"].read_bytes()).hexdigest()
    vae = [state[key].numpy().tobytes() for key in sorted(state) if key.startswith("first_stage_model.")]
    tensors = hashlib.sha256(b"".join(vae)).hexdigest()
    assert vae_name(found, "") == vae_name(found, "0" * 64) == f"unknown, tensors sha256 {tensors}"
    names = {file: vae_name(found, digest) for digest, (file, _) in KNOWN_FILES.items()}
    assert names == {
        "sd_xl_refiner_1.0": f"1.0, tensors sha256 {tensors}",
        "sd_xl_refiner_1.0_0.9vae": f"0.9, tensors sha256 {tensors}",
        "sd_xl_base_1.0": f"1.0, tensors sha256 {tensors}",
        "sd_xl_base_1.0_0.9vae": f"0.9, tensors sha256 {tensors}",
    }


@pytest.mark.parametrize(
    ("key", "is_vae"), [("model.diffusion_model.out.2.bias", False), ("first_stage_model.decoder.conv_out.bias", True)]
)
def test_the_vaes_hash_is_of_its_tensors_alone(
    key: str, is_vae: bool, files: dict[str, Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    state[key] += 1
    changed = open_checkpoint(write(tmp_path / "a.safetensors", state, metadata()))
    assert (vae_name(changed, "") != vae_name(open_checkpoint(files["refiner"]), "")) is is_vae


# --- a file that changes ------------------------------------------------------------------------------------------


def replaced(path: Path, new: Path) -> None:
    """By another file, as a download or a training run that ends gives it its name."""
    copy = path.with_suffix(".new")
    copy.write_bytes(new.read_bytes())
    copy.replace(path)


def overwritten(path: Path, new: Path) -> None:
    """As `cp` does: the same file, with other bytes."""
    path.write_bytes(new.read_bytes())


def touched(path: Path, new: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES = [replaced, overwritten, touched]


@pytest.fixture
def pair(state: dict[str, Tensor], tmp_path: Path) -> tuple[Path, Path]:
    """A file, and another one of the same length and names, with other weights."""
    first = write(tmp_path / "a.safetensors", state, metadata())
    second = write(tmp_path / "b.safetensors", {key: tensor + 1 for key, tensor in state.items()}, metadata())
    assert first.stat().st_size == second.stat().st_size
    return first, second


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", ["load", "sha256", "vae_name"])
def test_a_file_that_is_replaced_after_it_was_opened_is_not_read(
    read: str, change: Callable[[Path, Path], None], pair: tuple[Path, Path]
) -> None:
    """Or a picture would be painted by other weights than its settings name."""
    path, other = pair
    found = open_checkpoint(path)
    change(path, other)
    reads: dict[str, Callable[[], object]] = {
        "load": lambda: found.load("unet"),
        "sha256": found.sha256,
        "vae_name": lambda: vae_name(found, ""),
    }
    with pytest.raises(InputError, match=f"{path} has changed since it was opened: start again"):
        reads[read]()
    assert found.changed() == [path]


def test_the_hash_is_of_what_was_read_whatever_comes_after(pair: tuple[Path, Path]) -> None:
    path, other = pair
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    found = open_checkpoint(path)
    assert found.sha256() == expected
    replaced(path, other)
    assert found.sha256() == expected


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_file_of_a_folder_that_is_replaced_is_not_read(part: str, files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["refiner"], tmp_path / "model", "diffusers")
    found = open_checkpoint(tmp_path / "model")
    weights = tmp_path / "model" / part / "diffusion_pytorch_model.safetensors"
    replaced(weights, weights)
    for read in (lambda: found.load(part), found.sha256):
        with pytest.raises(InputError, match=f"{weights} has changed since it was opened"):
            read()


def test_a_file_that_is_gone_is_told(pair: tuple[Path, Path]) -> None:
    path, _ = pair
    found = open_checkpoint(path)
    path.unlink()
    with pytest.raises(InputError, match=f"could not read {path}: no such file"):
        found.load("unet")
    assert found.changed() == [path]


RUNS = {
    "refine": ["refine", "PHOTO", "--checkpoint", "MODEL"],
    "generate": ["generate", "--base", "MODEL"],
    "generate, the refiner": ["generate", "--base", "pocket", "--refiner", "MODEL"],
}


@pytest.mark.parametrize("name", sample(RUNS, "refine", "generate, the refiner"))
def test_a_picture_names_the_file_that_painted_it(
    name: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although another file took its name while the picture was painted, which is told in a line."""
    kind = "base" if name == "generate" else "refiner"
    model = tmp_path / "model.safetensors"
    model.write_bytes(POCKET[f"pocket-{kind}"].read_bytes())
    expected = hashlib.sha256(model.read_bytes()).hexdigest()
    places = {"MODEL": str(model), "PHOTO": str(photo)}
    words = [*(places.get(word, word) for word in RUNS[name]), "--prompt", "a cup", "--steps", "5"]
    words += ["--width", "64", "--height", "64"] if "generate" in words else []
    assert main([*words, "--out", str(tmp_path / "before.png")]) == 0
    assert "has changed" not in capsys.readouterr().err

    decode = Pipeline.decode

    def replace_and_decode(self: Pipeline, latents: Tensor) -> Tensor:
        replaced(model, tmp_path / "before.png")
        return decode(self, latents)

    monkeypatch.setattr(Pipeline, "decode", replace_and_decode)
    assert main([*words, "--out", str(tmp_path / "after.png")]) == 0
    assert f"note: {model} has changed meanwhile" in capsys.readouterr().err
    assert (pixels(tmp_path / "after.png") == pixels(tmp_path / "before.png")).all()
    key = "refiner_checkpoint" if "the refiner" in name else "checkpoint"
    assert settings(tmp_path / "after.png")[key]["sha256"] == expected


def test_a_photo_is_named_by_the_bytes_that_were_used(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "photo.png"
    own.write_bytes(photo.read_bytes())
    expected = hashlib.sha256(own.read_bytes()).hexdigest()
    decode = Pipeline.decode

    def replace_and_decode(self: Pipeline, latents: Tensor) -> Tensor:
        own.write_bytes(b"another one")
        return decode(self, latents)

    monkeypatch.setattr(Pipeline, "decode", replace_and_decode)
    refine = Refine(own, POCKET["pocket-refiner"])
    assert refine(out=tmp_path / "out.png") == 0
    assert settings(tmp_path / "out.png")["image_sha256"] == expected


# --- the wrong kind -----------------------------------------------------------------------------------------------


def test_a_refiner_is_no_base(tmp_path: Path, files: dict[str, Path]) -> None:
    for path in (sparse_file(tmp_path / "a.safetensors", listed_shapes("refiner")), files["refiner"]):
        with pytest.raises(InputError, match=r"expected a base .*found an SDXL refiner"):
            TextToImagePipeline.from_pretrained(path)


@released
def test_a_file_of_full_size_with_one_key_less(kind: str, tmp_path: Path) -> None:
    shapes = listed_shapes(kind)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.3.attn2.to_k.weight"
    del shapes[key]
    line = error_of(sparse_file(tmp_path / "a.safetensors", shapes))
    assert line.endswith(f"looks like an SDXL {kind}, but its tensors do not fit: 1 missing: {key}")


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time, torch
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from weights_convert.convert import convert

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def measure(dtype):
    global peak, running
    before = peak = anonymous()
    running = True
    thread = threading.Thread(target=watch)
    thread.start()
    found = open_checkpoint(sys.argv[2])
    parts = [found.load(part, dtype) for part in prefixes(found.config)]
    running = False
    thread.join()
    assert all(p.dtype == dtype for part in parts for p in part.parameters())
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return max(peak, anonymous()) - before, weights

open_checkpoint(sys.argv[1]).load("vae")  # what loads once and stays: libraries, allocator
for name in sys.argv[3:]:
    print(name, *measure(getattr(torch, name)))
"""
COPY = 1.1  # of the weights: one copy, and what is cast at the moment
MAPPED = 0.2  # of the weights: they stay in the file, and the system's cache counts as nobody's memory


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 210 MB in float16."""
    config = replace(
        REFINER,
        unet=replace(REFINER.unet, model_channels=192, num_res_blocks=1, context_dim=512),
        text_encoders=(replace(OPENCLIP, width=512, heads=8),),
    )
    path = tmp_path_factory.mktemp("large") / "a.safetensors"
    save_checkpoint(path, config, parts_of(config), torch.float16)
    assert 150e6 < path.stat().st_size < 300e6
    return path


COPIES = {"float16": MAPPED, "float32": COPY, "bfloat16": COPY}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(
    "dtypes", [("float16", "float32"), pytest.param(("bfloat16",), marks=pytest.mark.sweep)], ids="-".join
)
def test_loading_takes_one_copy_of_the_weights_at_most(
    dtypes: tuple[str, ...], files: dict[str, Path], large_file: Path
) -> None:
    """Anonymous memory at its peak; in the file's own dtype the weights stay mapped from the file."""
    command = [sys.executable, "-c", MEASURE, str(files["refiner"]), str(large_file), *dtypes]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [dtype for dtype, *_ in lines] == list(dtypes)
    for dtype, grown, weights in lines:
        size = large_file.stat().st_size * (2 if dtype == "float32" else 1)
        assert int(weights) == pytest.approx(size, rel=0.01)
        assert int(grown) <= COPIES[dtype] * size
        assert int(grown) >= (0.9 if COPIES[dtype] == COPY else 0) * size  # the measure sees the copy
