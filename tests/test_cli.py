"""The command line: a run and what it leaves, `info`, and every case of bad input in one line with status 2."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import SMALL_BASE, SMALL_REFINER
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_ref
from sdxl_ref import ecosystem
from sdxl_ref.checkpoint import CONFIG_KEY, build, prefixes
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.images import from_tensor, load_image
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from weights_convert.cli import main as convert_command

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small run no faster on several, and far slower where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64x64, smooth."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(PIXELS).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the command runs in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class Command:
    """`refine` on the small checkpoint and the photo; options are replaced by name, or left out with None."""

    def __init__(self, photo: Path, checkpoint: Path) -> None:
        self.image = str(photo)
        self.options: dict[str, Any] = {"prompt": "a cat", "checkpoint": checkpoint, "steps": 4, "strength": 0.5}

    def words(self, image: Any = None, **changes: Any) -> list[str]:
        options = {name: value for name, value in (self.options | changes).items() if value is not None}
        words = ["refine", str(image or self.image)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words

    def __call__(self, image: Any = None, **changes: Any) -> int:
        return main(self.words(image, **changes))


@pytest.fixture
def refine(photo: Path, small_refiner_file: Path) -> Command:
    return Command(photo, small_refiner_file)


def settings(path: Path) -> tuple[dict[str, Any], str]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return json.loads(image.text["sdxl_ref"]), image.text["parameters"]  # type: ignore[attr-defined]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path))


# --- a run --------------------------------------------------------------------------------------------------------


def test_refine(refine: Command, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refine(out="out.png", seed=7, negative_prompt="blurry", steps=10, strength=0.4) == 0
    captured = capsys.readouterr()
    sigmas = NoiseSchedule().discretize(10).tolist()[-5:]
    assert captured.err == ""  # no progress bar, since this is no terminal
    assert captured.out.splitlines() == [
        f"{small_refiner_file.name}: SDXL-like refiner, float32 on {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "picture: 64x64, used at 64x64",
        f"plan: 4 of 10 steps, sigma {sigmas[0]:.4g} → 0",
        "wrote out.png",
    ]
    assert os.listdir(here) == ["out.png"]
    assert Image.open("out.png").size == (64, 64)

    made, parameters = settings(here / "out.png")
    sha256 = hashlib.sha256(small_refiner_file.read_bytes()).hexdigest()
    expected = {
        "command": "refine",
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "seed": 7,
        "num_inference_steps": 10,
        "strength": 0.4,
        "guidance_scale": 5.0,
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
        "sampler": "euler",
        "spacing": "leading",
        "karras": False,
        "dtype": "float32",
        "size": "64x64",
        "sigmas": sigmas,
        "timesteps": [301, 201, 101, 1],
    }
    assert {key: made[key] for key in expected} == expected
    assert made["checkpoint"]["sha256"] == sha256
    assert made["checkpoint"]["file"] == small_refiner_file.name
    assert made["checkpoint"]["vae"].startswith("unknown, tensors sha256 ")
    assert made["image_sha256"] == hashlib.sha256(Path(refine.image).read_bytes()).hexdigest()
    assert made["versions"] == {"sdxl_ref": sdxl_ref.__version__, "torch": torch.__version__}
    assert parameters == (
        "a cat\nNegative prompt: blurry\nSteps: 10, Sampler: euler, Schedule type: leading, CFG scale: 5.0, Seed: 7, "
        f"Size: 64x64, Denoising strength: 0.4, Model hash: {sha256[:10]}, Version: sdxl-ref {sdxl_ref.__version__}"
    )


def test_the_picture_is_the_pipelines(refine: Command, here: Path, photo: Path, small_refiner_file: Path) -> None:
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "aesthetic_score": 7.5, "sampler": "ddpm"}
    options |= {"spacing": "trailing", "negative_prompt": "a dog", "strength": 0.75, "negative_aesthetic_score": 1.0}
    assert refine(seed=11, device="cpu", out="out.png", karras=True, **options) == 0
    pipe = ecosystem.ImageToImagePipeline.from_single_file(small_refiner_file)
    generator = torch.Generator().manual_seed(11)
    [image] = pipe(
        "a cat", image=load_image(photo), num_inference_steps=4, karras=True, generator=generator, **options
    ).images
    assert np.array_equal(pixels(here / "out.png"), np.asarray(image))


def test_same_seed_same_bytes(refine: Command, here: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert refine(out=name, seed=seed) == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert not np.array_equal(pixels(here / "a.png"), pixels(here / "c.png"))


@pytest.fixture(scope="module")
def plain_picture(photo: Path, small_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("plain") / "out.png"
    assert Command(photo, small_refiner_file)(out=path) == 0
    return pixels(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"negative_prompt": "a dog"},
        {"strength": 0.75},
        {"steps": 6},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"aesthetic_score": 1.0},
        {"negative_aesthetic_score": 9.0},
        {"sampler": "ddpm"},
        {"spacing": "trailing"},
        {"karras": True},
        {"dtype": "bfloat16"},
        {"strength_rule": "sgm"},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(
    refine: Command, here: Path, plain_picture: np.ndarray, changes: dict[str, Any]
) -> None:
    assert refine(out="out.png", **changes) == 0
    assert not np.array_equal(pixels(here / "out.png"), plain_picture)


def test_the_settings_tell_the_adapters_by_their_hashes(
    refine: Command, here: Path, small_refiner_file: Path, small_base_file: Path
) -> None:
    layer = "lora_unet_middle_block_1_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 128), f"{layer}.lora_up.weight": torch.ones(128, 1)}
    save_file(factors, "a.safetensors")
    sha256 = [hashlib.sha256((here / "a.safetensors").read_bytes()).hexdigest()]
    assert refine(out="out.png", lora="a.safetensors:0.5") == 0
    assert settings(here / "out.png")[0]["lora_sha256"] == sha256
    models = ["--base", str(small_base_file), "--refiner", str(small_refiner_file), "--lora", "a.safetensors"]
    size = ["--height", "64", "--width", "64", "--steps", "5", "--prompt", "a cat"]
    assert main(["generate", *models, *size]) == 0
    assert settings(here / "generated.png")[0]["lora_sha256"] == sha256


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (8, 24)])
def test_the_smallest_pictures(refine: Command, here: Path, size: tuple[int, int], guidance_scale: float) -> None:
    """At a latent of 1x1 a group of the UNet's first norm is a single value."""
    Image.new("RGB", size, "green").save("in.png")
    assert refine("in.png", out="out.png", guidance_scale=guidance_scale) == 0
    assert Image.open("out.png").size == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_does_not_matter(refine: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, exif in (
        ("a.jpg", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\0\0"),
        ("b.jpg", b"Exif\0\0II"),
    ):
        Image.new("RGB", (64, 64), "green").save(name, exif=exif)
        assert load_image(name).info == {}  # nothing of it goes on
        assert refine(name, out="out.png") == 0
    assert capsys.readouterr().err == ""


def test_the_name_of_the_picture_is_derived(refine: Command, here: Path) -> None:
    assert refine() == 0
    assert os.listdir(here) == ["photo-refined.png"]


def test_save_latents(refine: Command, here: Path, small_refiner_file: Path) -> None:
    assert refine(out="out.png", save_latents="out.safetensors", device="cpu") == 0
    assert sorted(os.listdir(here)) == ["out.png", "out.safetensors"]
    with safe_open("out.safetensors", framework="pt") as file:
        latents = file.get_tensor("latents")
        assert file.metadata() == {"sigma": "0.0"}
    assert latents.shape == (1, 4, 8, 8)
    assert latents.dtype == torch.float32
    pipe = ImageToImagePipeline.from_single_file(small_refiner_file)
    with torch.no_grad():
        [decoded] = from_tensor(pipe.decode(latents))
    assert np.array_equal(pixels(here / "out.png"), np.asarray(decoded))


@pytest.mark.parametrize(("size", "used"), [((67, 75), "64x72"), ((1500, 1000), "1248x832")])
def test_the_size_of_the_picture(
    refine: Command, here: Path, size: tuple[int, int], used: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Image.new("RGB", size, "green").save("in.jpg")
    if size[0] > 1000:  # large pictures take long: the plan is all that is looked at
        monkeypatch.setattr(ImageToImagePipeline, "from_single_file", stop)
        with pytest.raises(Stopped):
            refine("in.jpg")
        return
    assert refine("in.jpg", out="out.png") == 0
    assert f"picture: {size[0]}x{size[1]}, used at {used}" in capsys.readouterr().out
    assert settings(here / "out.png")[0]["size"] == used


class Stopped(Exception):  # noqa: N818 (it is none)
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Stopped


def test_a_file_without_configuration_is_said_to_be_guessed(
    refine: Command, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(small_refiner_file), "plain.safetensors")
    assert refine(checkpoint="plain.safetensors") == 0
    note = f"note: no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
    assert capsys.readouterr().out.splitlines()[1] == note


def test_a_prompt_over_77_tokens_runs_and_shows_what_was_cut(
    refine: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = " ".join(["cat"] * 75)
    assert refine(prompt=f"{kept} on a purple mat", out="a.png") == 0
    err = capsys.readouterr().err
    assert err == "warning: the prompt is longer than 77 tokens; cut: 'on a purple mat'\n"
    assert refine(prompt=kept, out="b.png") == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(pixels(here / "a.png"), pixels(here / "b.png"))


def test_an_empty_prompt_runs(refine: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refine(prompt="", out="a.png") == 0
    assert refine(prompt="a cat", out="b.png") == 0
    assert capsys.readouterr().err == ""
    assert settings(here / "a.png")[0]["prompt"] == ""
    assert not np.array_equal(pixels(here / "a.png"), pixels(here / "b.png"))


def test_stopped_from_the_keyboard(
    refine: Command, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageToImagePipeline, "decode", interrupt)
    assert refine() == 1
    assert capsys.readouterr().err == "sdxl-ref: stopped\n"
    assert os.listdir(here) == []
    monkeypatch.setattr("sdxl_ref.cli.import_module", interrupt)  # while the libraries are still coming
    assert refine() == 1
    assert capsys.readouterr().err == "sdxl-ref: stopped\n"


# --- info ---------------------------------------------------------------------------------------------------------


def parameters(kind: str, part: str) -> int:
    config = SMALL_REFINER if kind == "refiner" else SMALL_BASE
    return sum(p.numel() for p in build(part, config).parameters())


@pytest.mark.parametrize("kind", ["refiner", "base"])
def test_info(kind: str, small_refiner_file: Path, small_base_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_refiner_file if kind == "refiner" else small_base_file
    assert main(["info", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == f"{path}: SDXL-like {kind}"
    for part in prefixes(SMALL_REFINER if kind == "refiner" else SMALL_BASE):
        [line] = [line for line in lines if line.split()[0] == part]
        assert f"{parameters(kind, part):,} parameters" in line
        assert line.endswith("parameters  F16")
    assert "extras: none" in lines
    assert "sha256:" not in "".join(lines[:-1])
    assert lines[-1].startswith("VAE: unknown, tensors sha256 ")


def test_info_check(small_refiner_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(small_refiner_file), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sha256 = hashlib.sha256(small_refiner_file.read_bytes()).hexdigest()
    assert f"sha256: {sha256} (not an official file)" in lines
    assert "finite: every value of every tensor" in lines


@pytest.mark.parametrize(
    ("extra", "title", "printed"),
    [
        ("denoiser.sigmas", ("modelspec.title", "a small one"), ("denoiser.sigmas", "modelspec.title: a small one")),
        (
            "model_ema.\x1b[31m",
            ("title\x1b[2J", "red \x1b[31m\r\nsha256: \u202e0"),
            ("model_ema.?[31m", "title?[2J: red ?[31m??sha256: ?0"),
        ),
    ],
    ids=["plain", "control characters"],
)
def test_info_names_extras_and_metadata(
    here: Path,
    small_refiner_file: Path,
    capsys: pytest.CaptureFixture[str],
    extra: str,
    title: tuple[str, str],
    printed: tuple[str, str],
) -> None:
    state = load_file(small_refiner_file) | {extra: torch.ones(1000)}
    save_file(state, "a.safetensors", {CONFIG_KEY: SMALL_REFINER.to_json(), title[0]: title[1]})
    assert main(["info", "a.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"extras: {printed[0]}" in lines
    assert printed[1] in lines
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_info_on_a_folder(
    value: float, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, vae = "decoder.conv_in.bias", here / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    assert convert_command(["convert", str(small_refiner_file), "model", "--to", "diffusers"]) == 0
    capsys.readouterr()
    state = load_file(vae)
    state[name][0] = value
    save_file(state, vae, {"format": "pt"})
    assert main(["info", "model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model: SDXL-like refiner"
    assert any(line.startswith("unet ") and f"{parameters('refiner', 'unet'):,} parameters" in line for line in lines)
    assert main(["info", "model", "--check"]) == (0 if value == 1 else 2)
    captured = capsys.readouterr()
    if value == 1:
        assert "finite: every value of every tensor" in captured.out.splitlines()
    else:
        assert_one_line(captured, f"1 tensors hold NaN or infinite values: first_stage_model.{name}")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_info_check_reads_8_bit_weights(
    dtype: torch.dtype, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, name = load_file(small_refiner_file), "model.diffusion_model.out.2.weight"
    for value in (1.0, math.nan):
        state[name] = torch.full_like(state[name], value, dtype=torch.float32).to(dtype)
        save_file(state, "a.safetensors", {CONFIG_KEY: SMALL_REFINER.to_json()})
        assert main(["info", "a.safetensors", "--check"]) == (0 if value == 1 else 2)
    captured = capsys.readouterr()
    assert f"F16, F8_{str(dtype).split('_', 1)[1].upper().removesuffix('FN')}" in captured.out
    assert_one_line(captured, f"a.safetensors: 1 tensors hold NaN or infinite values: {name}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_info_check_names_tensors_that_are_not_finite(
    value: float, dtype: torch.dtype, here: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in load_file(small_refiner_file).items()}
    name = "first_stage_model.decoder.conv_in.weight"
    state[name][-1, -1, -1, -1] = value
    save_file(state, "a.safetensors", {CONFIG_KEY: SMALL_REFINER.to_json()})
    assert main(["info", "a.safetensors", "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"sdxl-ref: error: a.safetensors: 1 tensors hold NaN or infinite values: {name}\n"
    assert captured.out == ""
    assert main(["info", "a.safetensors"]) == 0  # the header alone tells nothing of it


# --- bad input ----------------------------------------------------------------------------------------------------

Changes = dict[str, Any]
Case = Callable[[Path, Path], Changes]  # (folder to put files into, good checkpoint) -> changes to the command


def given(**changes: Any) -> Case:
    return lambda folder, good: changes


def weights(edit: Callable[[dict[str, torch.Tensor]], Any], **changes: Any) -> Case:
    """The good checkpoint with its tensors edited."""

    def case(folder: Path, good: Path) -> Changes:
        state = load_file(good)
        edit(state)
        save_file(state, folder / "edited.safetensors", {CONFIG_KEY: SMALL_REFINER.to_json()})
        return {"checkpoint": folder / "edited.safetensors"} | changes

    return case


def content(edit: Callable[[bytes], bytes], name: str = "edited.safetensors") -> Case:
    """A file of the good checkpoint's bytes, edited."""

    def case(folder: Path, good: Path) -> Changes:
        (folder / name).write_bytes(edit(good.read_bytes()))
        return {"checkpoint": folder / name}

    return case


def poisoned(*keys: str, value: float = math.nan, rows: slice = slice(None)) -> Case:
    def edit(state: dict[str, torch.Tensor]) -> None:
        for key in keys:
            state[key][rows] = value

    return weights(edit)


def folder_of(*names: str) -> Case:
    def case(folder: Path, good: Path) -> Changes:
        (folder / "weights").mkdir()
        for name in names:
            (folder / "weights" / name).write_bytes(b"")
        return {"checkpoint": folder / "weights"}

    return case


def picture(data: bytes | Image.Image) -> Case:
    def case(folder: Path, good: Path) -> Changes:
        path = folder / "in.png"
        path.write_bytes(data) if isinstance(data, bytes) else data.save(path)
        return {"image": path}

    return case


def lying_header(data: bytes) -> bytes:
    """The first tensor's end moved."""
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[first]["data_offsets"][1] += 2
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


NORM = "first_stage_model.decoder.norm_out.weight"
TIFF = b"II*\0\x08\0\0\0\x02\0\0\x01\x03\0\xff\xff\xff\x7f\x40\0\0\0"  # Pillow warns, then it refuses
UNFINISHED = "returned values that are not finite"
BAD: dict[str, tuple[Case, str]] = {
    # the checkpoint
    "no safetensors": (content(lambda data: b"hello" * 99), "expected a whole safetensors file, could not read"),
    "an empty file": (content(lambda data: b""), "expected a whole safetensors file, could not read"),
    "truncated": (content(lambda data: data[:-1]), "expected a whole safetensors file, could not read"),
    "a lying header": (content(lying_header), "expected a whole safetensors file, could not read"),
    "a missing key": (weights(lambda s: s.pop(NORM)), f"do not fit: 1 missing: {NORM}"),
    "an unexpected key": (weights(lambda s: s.update(x=torch.ones(1))), "do not fit: 1 unexpected: x"),
    "weights of whole numbers": (
        weights(lambda s: s.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"expected weights in floating point, found 1 others, as {NORM}",
    ),
    "a misshapen key": (
        weights(lambda s: s.update({NORM: torch.ones(7)})),
        f"do not fit: 1 of another shape: {NORM} (expected 32, found 7)",
    ),
    "another model": (
        lambda folder, good: (
            save_file({"unet.x": torch.ones(1)}, folder / "a.safetensors") or {"checkpoint": folder / "a.safetensors"}
        ),
        "is no SDXL checkpoint in the official layout",
    ),
    ".ckpt": (content(lambda data: data, "a.ckpt"), "a.ckpt is a pickle, which can run any code when opened"),
    ".bin": (content(lambda data: data, "a.bin"), "a.bin is a pickle, which can run any code when opened"),
    "a missing file": (given(checkpoint="none.safetensors"), "no such checkpoint: none.safetensors"),
    "an empty folder": (folder_of(), "expected one .safetensors file in the folder"),
    "a folder of pickles": (folder_of("model.bin", "config.json"), "expected one .safetensors file in the folder"),
    "a folder of two": (folder_of("a.safetensors", "b.safetensors"), "found a.safetensors, b.safetensors"),
    "NaN in the UNet": (
        poisoned("model.diffusion_model.out.2.bias"),
        f"the UNet, on the step to sigma 0.04131, {UNFINISHED}",
    ),
    "NaN deep in the UNet": (
        poisoned("model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.bias"),
        f"the UNet, on the step to sigma 0.04131, {UNFINISHED}",
    ),
    "NaN in the text encoder": (
        poisoned("conditioner.embedders.0.model.positional_embedding"),
        f"the text encoder {UNFINISHED}",
    ),
    "NaN in the last text block": (
        poisoned("conditioner.embedders.0.model.ln_final.weight"),
        f"the text encoder's pooled vector {UNFINISHED}",
    ),
    "NaN in the VAE's encoder": (poisoned("first_stage_model.encoder.conv_in.bias"), f"the VAE's encoder {UNFINISHED}"),
    "NaN in the VAE's log variances": (
        poisoned("first_stage_model.quant_conv.bias", rows=slice(4, 8)),
        f"the VAE's encoder {UNFINISHED}",
    ),
    "NaN in the VAE's decoder": (
        poisoned("first_stage_model.decoder.conv_out.bias"),
        f"the VAE's decoder {UNFINISHED}",
    ),
    "infinity in the UNet": (
        poisoned("model.diffusion_model.out.2.bias", value=math.inf),
        f"the UNet, on the step to sigma 0.04131, {UNFINISHED}",
    ),
    # the picture
    "no picture": (picture(b"hello"), "expected a picture (PNG, JPEG, WebP, …), could not read"),
    "a damaged TIFF": (picture(TIFF), "expected a picture (PNG, JPEG, WebP, …), could not read"),
    "an empty picture": (picture(b""), "expected a picture (PNG, JPEG, WebP, …), could not read"),
    "a missing picture": (given(image="none.png"), "no such picture: none.png"),
    "a folder as picture": (given(image="."), "expected a picture"),
    "1 pixel wide": (picture(Image.new("RGB", (1, 500))), "expected a picture of at least 8x8 pixels, found 1x500"),
    "7 pixels high": (picture(Image.new("RGB", (500, 7))), "expected a picture of at least 8x8 pixels, found 500x7"),
    # the numbers
    **{
        f"strength {value}": (given(strength=value), f"strength must be above 0 and at most 1, found {found}")
        for value, found in (("0", "0.0"), ("-0.5", "-0.5"), ("1.01", "1.01"), ("nan", "nan"), ("inf", "inf"))
    },
    "strength that is no number": (given(strength="a lot"), "argument --strength: invalid float value: 'a lot'"),
    "0 steps": (given(steps=0), "the number of steps must be a whole number from 1 to 1000, found 0"),
    "-1 steps": (given(steps=-1), "the number of steps must be a whole number from 1 to 1000, found -1"),
    "1001 steps": (given(steps=1001), "the number of steps must be a whole number from 1 to 1000, found 1001"),
    "1000 leading steps": (given(steps=1000), '"leading" with 1000 steps leaves the 1000 training steps'),
    "half a step": (given(steps=2.5), "argument --steps: invalid int value: '2.5'"),
    "too little strength for 1 step": (given(steps=1), "runs 0 steps: the smallest strength is 1.0"),
    "too little strength": (given(steps=10, strength=0.09), "runs 0 steps: the smallest strength is 0.1"),
    "too little strength for sgm": (
        given(steps=10, strength=0.1, strength_rule="sgm"),
        "runs 0 steps: the smallest strength is 0.1819",
    ),
    **{
        f"seed {value}": (
            given(seed=value),
            f"argument --seed: expected a whole number from -2^63 to 2^64 - 1, found {value}",
        )
        for value in (2**64, -(2**63) - 1)
    },
    "a seed that is no number": (given(seed="a lot"), "argument --seed: invalid seed value: 'a lot'"),
    **{
        f"guidance_rescale {value}": (
            given(guidance_rescale=value),
            f"guidance_rescale must be from 0 to 1, found {float(value)}",
        )
        for value in ("-0.1", "1.1", "nan", "inf")
    },
    "a watermark in a small picture": (given(watermark=True), "needs a picture of 256x256 pixels or more, found 64x64"),
    # the names
    "an unknown sampler": (given(sampler="banana"), "unknown sampler 'banana': expected one of euler, "),
    "an unknown spacing": (
        given(spacing="banana"),
        "unknown spacing 'banana': expected one of leading, trailing, linspace, sgm",
    ),
    "an unknown strength rule": (
        given(strength_rule="banana"),
        "unknown strength rule 'banana': expected one of exact, sgm",
    ),
    "an unknown dtype": (given(dtype="int8"), "argument --dtype: invalid choice: 'int8'"),
    **{
        f"device {name}": (given(device=name), f"device '{name}' is not to be had: expected auto, cpu, cuda or mps")
        for name in ("banana", "", "cuda:99", "meta", "hpu", "xla", "cpu:-1")
    },
    "an unknown option": (given(banana=1), "unrecognized arguments: --banana"),
    "no prompt": (given(prompt=None), "the following arguments are required: --prompt"),
    "no checkpoint": (given(checkpoint=None), "the following arguments are required: --checkpoint"),
    # where the results go
    "out in a missing folder": (
        given(out="none/out.png"),
        "cannot write none/out.png: expected a file name in an existing",
    ),
    "out is a folder": (given(out="."), "cannot write .: expected a file name in an existing"),
    "out with an endless name": (given(out="a" * 300 + ".png"), "write"),
    "latents in a missing folder": (given(save_latents="none/a.safetensors"), "cannot write none/a.safetensors"),
    "latents with an endless name": (given(save_latents="a" * 300), "write"),
}


def assert_one_line(captured: Any, message: str) -> None:
    print(captured.err.rstrip())  # `pytest -s -k bad_input` lists them all
    assert captured.err.startswith("sdxl-ref: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert len(captured.err) < 600


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_status_2_and_no_file(
    case: str, refine: Command, here: Path, tmp_path: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    changes = make(tmp_path, small_refiner_file)
    assert refine(**{"out": "out.png"} | changes) == 2
    assert_one_line(capsys.readouterr(), message)
    assert os.listdir(here) == []


def test_a_base_is_no_refiner(
    refine: Command, here: Path, small_base_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(checkpoint=small_base_file) == 2
    assert_one_line(capsys.readouterr(), "expected a refiner")
    assert os.listdir(here) == []


def test_an_open_base_is_no_refiner_either(small_base_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ecosystem.TextToImagePipeline.open(small_base_file)
    monkeypatch.setattr(type(opened), "load", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InputError, match=f"expected a refiner .*, found an SDXL base: .*{small_base_file.name}"):
        ImageToImagePipeline.from_single_file(opened)


def test_a_smallest_strength_that_is_named_works(refine: Command, here: Path) -> None:
    assert refine(steps=7, strength=0.1429) == 0


@pytest.mark.parametrize(
    "words", [[], ["banana"], ["refine"], ["info"], ["info", "none.safetensors"], ["info", "a", "b"]]
)
def test_wrong_usage(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert_one_line(capsys.readouterr(), "")


@pytest.mark.parametrize("words", [["--help"], ["refine", "--help"], ["info", "--help"], ["--version"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "sdxl-ref" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refine: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert refine(out="locked/out.png") == 2
    assert_one_line(capsys.readouterr(), "cannot write locked/out.png")


def test_what_cannot_be_written_is_found_before_the_work(
    refine: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageToImagePipeline, "from_single_file", stop)
    assert refine(out="none/out.png") == 2
    assert refine(out="out.png", watermark=True) == 2  # the picture is too small for it
    with pytest.raises(Stopped):
        refine(out="out.png")


@pytest.mark.parametrize("failing", ["out.png", "out.safetensors"])
def test_a_full_disk_leaves_nothing_behind(
    failing: str, refine: Command, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents alone are no result; the picture alone is one. No half file is."""

    def replace(self: Path, target: Path) -> Path:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        os.replace(self, target)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    assert refine(out="out.png", save_latents="out.safetensors") == 2
    where = failing if failing == "out.png" else here / failing
    assert_one_line(capsys.readouterr(), f"could not write {where}: No space left on device")
    assert os.listdir(here) == ([] if failing == "out.png" else ["out.png"])


def test_what_is_read_is_not_written(
    refine: Command, here: Path, photo: Path, small_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is one file written twice; by whatever name."""
    Path("here").symlink_to(here)
    Path("in.png").write_bytes(photo.read_bytes())
    Path("link.png").symlink_to("in.png")
    before = {path: path.read_bytes() for path in (here / "in.png", small_refiner_file)}
    cases: list[Changes] = [{"out": out} for out in ("in.png", "here/in.png", "link.png", small_refiner_file)]
    cases += [{"out": "out.png", "save_latents": twin} for twin in ("out.png", "./out.png", "here/out.png")]
    cases += [{"out": "out.png", "save_latents": small_refiner_file}]
    for changes in cases:
        assert refine("in.png", **changes) == 2
        assert_one_line(capsys.readouterr(), "another file is read or written there: name another one")
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir()) == ["here", "in.png", "link.png"]


def test_what_is_no_file_is_not_replaced(
    refine: Command, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe here, as a device would be; and a link to nothing."""
    monkeypatch.setattr(ImageToImagePipeline, "from_single_file", stop)
    os.mkfifo("pipe")
    Path("link.png").symlink_to("none/out.png")
    for changes in ({"out": "pipe"}, {"save_latents": "pipe"}, {"out": "link.png"}):
        assert refine(**changes) == 2
        assert_one_line(capsys.readouterr(), "expected a file name in an existing, writable folder")


def test_results_go_through_links(refine: Command, here: Path) -> None:
    Path("folder").mkdir()
    for name, old in (("out.png", "old.png"), ("out.safetensors", "old.safetensors")):
        Path("folder", old).write_bytes(b"old")
        Path(name).symlink_to(Path("folder", old))
    assert refine(out="out.png", save_latents="out.safetensors") == 0
    assert os.readlink("out.png") == "folder/old.png"
    assert settings(here / "folder" / "old.png")[0]["prompt"] == "a cat"
    assert os.readlink("out.safetensors") == "folder/old.safetensors"
    assert load_file("folder/old.safetensors")["latents"].shape == (1, 4, 8, 8)
    assert sorted(os.listdir()) == ["folder", "out.png", "out.safetensors"]
    assert sorted(os.listdir("folder")) == ["old.png", "old.safetensors"]


# --- as a process -------------------------------------------------------------------------------------------------


def process(words: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdxl_ref", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_process_that_succeeds(refine: Command, here: Path) -> None:
    """With a prompt of bytes that are no UTF-8, as a shell may hand over."""
    words = [os.fsencode(word) for word in refine.words(out="out.png", prompt="PROMPT")]
    result = process([b"caf\xe9" if word == b"PROMPT" else word for word in words])
    assert (result.returncode, result.stderr) == (0, "")
    assert settings(here / "out.png")[1].startswith("caf?\n")


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [
        ("> /dev/full", 1, "sdxl-ref: error: [Errno 28] No space left on device\n"),
        ("| head -0", 1, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize("command", ["info", "refine"])
def test_a_process_whose_streams_are_full_or_closed(
    command: str, redirection: str, status: int, error: str, refine: Command, here: Path, small_refiner_file: Path
) -> None:
    words = ["info", str(small_refiner_file)] if command == "info" else refine.words(out="out.png")
    line = f'set -o pipefail; "$@" {redirection}'
    result = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-m", "sdxl_ref", *words], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (status, error)
    assert os.listdir(here) == (["out.png"] if command == "refine" and status == 0 else [])


@pytest.mark.parametrize("changes", [{"checkpoint": "none.safetensors"}, {"strength": 2}, {"dtype": "banana"}], ids=str)
def test_a_process_that_fails(refine: Command, here: Path, changes: dict[str, Any]) -> None:
    result = process(refine.words(**changes))
    assert result.returncode == 2
    assert result.stdout == ""
    assert_one_line(argparse_like(result), "")
    assert "Traceback" not in result.stderr
    assert os.listdir(here) == []


def argparse_like(result: subprocess.CompletedProcess[str]) -> Any:
    return type("Captured", (), {"err": result.stderr})


def test_a_progress_bar_on_a_terminal_with_the_true_number_of_steps(refine: Command, here: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "sdxl_ref", *refine.words(steps=10, strength=0.35)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(terminal, 4096):
            shown += block.decode()
    os.close(terminal)
    assert result.returncode == 0
    assert "3/3" in shown
    assert "step" in shown
    assert "step" not in result.stdout.decode().replace("3 of 10 steps", "")


CHURN = """
import resource
import torch
from sdxl_ref.commands.common import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def churn():
    before = faults()
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MiB
    return faults() - before
churn()
print(before := churn())
keep_freed_memory(torch.device("cpu"))
churn()
print(churn())
"""


GLIBC = platform.libc_ver()[1].split(".") if platform.libc_ver()[0] == "glibc" else ["0"]


@pytest.mark.skipif(list(map(int, GLIBC)) < [2, 35], reason="glibc's malloc alone is told, and an older one refuses")
def test_freed_memory_is_used_again() -> None:
    """Without it each tensor is made of new pages: at least one page fault for every 2 MiB."""
    output = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before >= 20 * 32
    assert after < 20


STOPPED = """
import sys, time
from sdxl_ref.commands import refine
def interrupted(*_, **__):
    raise KeyboardInterrupt
refine.identity = lambda checkpoint: time.sleep(300)
refine.ImageToImagePipeline.from_single_file = interrupted
from sdxl_ref.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_stopped_run_does_not_wait_for_the_files_hash(photo: Path, small_refiner_file: Path) -> None:
    command = [sys.executable, "-c", STOPPED, "refine", str(photo), "--checkpoint", str(small_refiner_file)]
    done = subprocess.run([*command, "--prompt", "a cat"], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (1, "sdxl-ref: stopped\n")


def test_a_file_that_cannot_be_hashed_is_told_before_the_steps(
    refine: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(checkpoint: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("sdxl_ref.commands.refine.identity", broken)
    monkeypatch.setattr(ImageToImagePipeline, "steps", lambda *_: pytest.fail("it went on"))
    assert refine() == 1
    assert os.listdir(here) == []
