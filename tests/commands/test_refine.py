"""`sdxl-ref refine`: a run and what it leaves: the picture, its settings, its latents."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import profiles
import pytest
import readers
import torch
from command_line import Refine, Stopped, pixels, settings, texts
from pairs import seeded
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_ref
from sdxl_ref.cli import main
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.pictures.images import from_tensor, load_image
from sdxl_ref.pipelines import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.weights.checkpoint import CONFIG_KEY


def test_what_is_printed(
    refine: Refine, here: Path, tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(out="out.png", steps=10, strength=0.4) == 0
    captured = capsys.readouterr()
    first = NoiseSchedule().discretize(10).tolist()[-5]
    assert captured.err == ""  # no progress bar, since this is no terminal
    assert captured.out.splitlines() == [
        f"{tiny_refiner_file.name}: SDXL-like refiner, float32 on {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "picture: 64x64, used at 64x64",
        f"plan: 4 of 10 steps, sigma {first:.4g} → 0",
        "wrote out.png",
    ]
    assert os.listdir(here) == ["out.png"]
    assert Image.open("out.png").size == (64, 64)


def test_the_picture_carries_all_that_it_takes_to_make_it_again(
    refine: Refine, here: Path, tiny_refiner_file: Path
) -> None:
    assert refine(out="out.png", seed=7, negative_prompt="blurry", steps=10, strength=0.4) == 0
    made = settings(here / "out.png")
    sha256 = hashlib.sha256(tiny_refiner_file.read_bytes()).hexdigest()
    expected = {
        "command": "refine",
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "seed": 7,
        "num_inference_steps": 10,
        "strength": 0.4,
        "strength_rule": "exact",
        "guidance_scale": 5.0,
        "guidance_rescale": 0.0,
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
        "sampler": "euler",
        "spacing": "leading",
        "karras": False,
        "eta": None,
        "prediction": "epsilon",
        "dtype": "float32",
        "watermark": False,
        "image": "photo.png",
        "size": "64x64",
        "lora": [],
        "sigmas": NoiseSchedule().discretize(10).tolist()[-5:],
        "timesteps": [301, 201, 101, 1],
        "unconditional": "negative prompt encoded",
    }
    assert {key: made[key] for key in expected} == expected
    assert made["checkpoint"]["sha256"] == sha256
    assert made["checkpoint"]["file"] == tiny_refiner_file.name
    assert made["checkpoint"]["vae"].startswith("unknown, tensors sha256 ")
    assert made["image_sha256"] == hashlib.sha256(Path(refine.image).read_bytes()).hexdigest()
    assert made["versions"] == {"sdxl_ref": sdxl_ref.__version__, "torch": torch.__version__}
    assert texts(here / "out.png")["parameters"] == (
        "a cat\nNegative prompt: blurry\nSteps: 10, Sampler: Euler, Schedule type: leading, CFG scale: 5.0, Seed: 7, "
        f"Size: 64x64, Model hash: {sha256[:10]}, Model: {tiny_refiner_file.stem}, Denoising strength: 0.4, "
        f"Version: sdxl-ref {sdxl_ref.__version__}"
    )


def test_the_picture_is_the_pipelines(refine: Refine, here: Path, photo: Path, tiny_refiner_file: Path) -> None:
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "aesthetic_score": 7.5, "sampler": "euler_ancestral"}
    options |= {"spacing": "trailing", "negative_prompt": "a dog", "strength": 0.75, "negative_aesthetic_score": 1.0}
    options |= {"eta": 0.8, "s_noise": 0.9}
    assert refine(seed=11, device="cpu", plain=True, out="out.png", karras=True, prediction="v", **options) == 0
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, prediction="v")
    generator = torch.Generator().manual_seed(11)
    call: dict[str, Any] = {"image": load_image(photo), "num_inference_steps": 4, "karras": True}
    [image] = pipe("a cat", **call, generator=generator, **options).images
    assert np.array_equal(pixels(here / "out.png"), np.asarray(image))


def test_the_base_refines_too(refine: Refine, here: Path, photo: Path, tiny_base_file: Path) -> None:
    options: dict[str, Any] = {"prompt_2": "a dog", "strength": 0.75}
    assert refine(checkpoint=tiny_base_file, seed=3, device="cpu", plain=True, out="out.png", **options) == 0
    pipe = TextToImagePipeline.from_pretrained(tiny_base_file)
    call: dict[str, Any] = {"image": load_image(photo), "num_inference_steps": 4, "generator": seeded(3)}
    [image] = pipe("a cat", **call, **options).images
    assert np.array_equal(pixels(here / "out.png"), np.asarray(image))
    made = settings(here / "out.png")
    assert (made["unconditional"], made["aesthetic_score"], made["prompt_2"]) == ("zeros", None, "a dog")


def test_both_experts_in_one_run(
    refine: Refine, here: Path, photo: Path, tiny_base_file: Path, tiny_refiner_file: Path
) -> None:
    files: dict[str, Any] = {"checkpoint": None, "base": tiny_base_file, "refiner": tiny_refiner_file}
    options: dict[str, Any] = {"strength": 1.0, "switch": 0.5}
    assert refine(**files, seed=3, device="cpu", plain=True, out="out.png", **options) == 0
    pipe = EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file)
    call: dict[str, Any] = {"image": load_image(photo), "num_inference_steps": 4, "generator": seeded(3)}
    [image] = pipe("a cat", **call, **options).images
    assert np.array_equal(pixels(here / "out.png"), np.asarray(image))
    made = settings(here / "out.png")
    assert made["unconditional"] == "base zeros; refiner empty prompt encoded"
    assert made["refiner_checkpoint"]["file"] == tiny_refiner_file.name
    assert 0.4 < made["refiner_switch"] < 0.6


def test_a_mask(refine: Refine, here: Path, photo: Path, tiny_refiner_file: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 20, 50, 40))
    mask.save(here / "mask.png")
    assert refine(mask="mask.png", seed=3, device="cpu", plain=True, out="out.png") == 0
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    call: dict[str, Any] = {"image": load_image(photo), "num_inference_steps": 4, "generator": seeded(3)}
    [image] = pipe("a cat", **call, strength=0.5, mask_image=mask).images
    assert np.array_equal(pixels(here / "out.png"), np.asarray(image))
    stays = np.asarray(mask) == 0
    assert np.array_equal(pixels(here / "out.png")[stays], pixels(photo)[stays])
    made = settings(here / "out.png")
    assert made["mask"] == "mask.png"
    assert made["mask_sha256"] == hashlib.sha256((here / "mask.png").read_bytes()).hexdigest()


def test_a_default_name_replaces_nothing(refine: Refine, here: Path) -> None:
    for _ in range(3):
        assert refine() == 0
    assert sorted(os.listdir(here)) == ["photo-refined-2.png", "photo-refined-3.png", "photo-refined.png"]


def test_on_a_cpu_weights_are_packed_unless_they_are_to_stay_plain(refine: Refine, here: Path) -> None:
    for name, plain in (("packed.png", None), ("plain.png", True)):
        assert refine(out=name, plain=plain, device="cpu", steps=10, strength=1.0) == 0
        assert settings(here / name)["packed"] is (plain is None)
    difference = pixels(here / "packed.png").astype(int) - pixels(here / "plain.png")
    assert abs(difference).max() <= 1


def test_where_weights_cannot_be_packed_the_run_goes_on_plain(
    refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert refine(out="out.png", device="cpu") == 0
    note = "note: the pipeline cannot be packed: expected a CPU with AVX2 or AVX-512, found one with SVE256"
    assert capsys.readouterr().out.count(note) == 1
    assert settings(here / "out.png")["packed"] is False


@pytest.mark.sweep
def test_compiled_networks_paint_the_plain_picture(
    refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph alone: what inductor makes of it takes a minute, and is tested with the networks."""
    monkeypatch.setattr("sdxl_ref.pipelines.compiled.try_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_graph))
    assert refine(out="compiled.png", compile=True, device="cpu") == 0
    assert "compiling: the first evaluation takes minutes" in capsys.readouterr().out
    assert refine(out="plain.png", plain=True, device="cpu") == 0
    ways = [
        {name: settings(here / file)[name] for name in ("packed", "compiled")} for file in ("compiled.png", "plain.png")
    ]
    assert ways == [{"packed": False, "compiled": True}, {"packed": False, "compiled": False}]
    assert np.abs(pixels(here / "compiled.png").astype(int) - pixels(here / "plain.png")).max() <= 1


def compile_graph(module: torch.nn.Module, **options: Any) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, **options | {"backend": "eager"})


def test_the_dtype_of_the_vae(refine: Refine, here: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert refine(out=f"{dtype}.png", vae_dtype=dtype, device="cpu") == 0
        assert settings(here / f"{dtype}.png")["vae_dtype"] == dtype
    difference = np.abs(pixels(here / "float32.png").astype(int) - pixels(here / "bfloat16.png"))
    assert 0 < difference.max() <= 16


def test_same_seed_same_bytes(refine: Refine, here: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert refine(out=name, seed=seed) == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert not np.array_equal(pixels(here / "a.png"), pixels(here / "c.png"))


@pytest.fixture(scope="module")
def plain_picture(photo: Path, tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("plain") / "out.png"
    assert Refine(photo, tiny_refiner_file)(out=path) == 0
    return pixels(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"prompt": ""},
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
        {"s_churn": 1.0},
        {"prediction": "v"},
        {"dtype": "bfloat16"},
        {"strength_rule": "sgm"},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(
    refine: Refine, here: Path, plain_picture: np.ndarray, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(out="out.png", **changes) == 0
    assert not np.array_equal(pixels(here / "out.png"), plain_picture)
    assert capsys.readouterr().err == ""
    made = settings(here / "out.png")
    for name, value in changes.items():
        assert made["num_inference_steps" if name == "steps" else name] == value


@pytest.mark.parametrize("lora", [None, "a.safetensors"])
def test_markup_of_other_tools_is_noted_once(
    lora: str | None, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = "lora_unet_middle_block_1_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(64, 1)}
    save_file(factors, "a.safetensors")
    assert refine(prompt="a (cat:1.3)", negative_prompt="BREAK", out="out.png", lora=lora) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: '(cat:1.3)', 'BREAK' in a prompt are read as words")
    assert error.count("\n") == 1
    for prompt in ("a AND b", "{a|b}", "embedding:foo"):  # the run looks for each of these marks
        assert refine(prompt=prompt, out="out.png", steps=4) == 0
        assert "in a prompt is read as words" in capsys.readouterr().err
    assert refine(prompt="a cat (grey)", out="out.png") == 0
    assert capsys.readouterr().err == ""


def test_a_seed_of_minus_1_is_drawn_and_told(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refine(seed=-1, out="a.png") == 0
    first, *_ = capsys.readouterr().out.splitlines()
    seed = settings(here / "a.png")["seed"]
    assert first == f"seed: {seed}"
    assert 0 <= seed < 2**32
    assert refine(seed=seed, out="b.png") == 0
    assert "seed" not in capsys.readouterr().out
    assert np.array_equal(pixels(here / "a.png"), pixels(here / "b.png"))
    assert refine(seed=-1, out="c.png") == 0
    assert settings(here / "c.png")["seed"] != seed


def test_a_prompt_over_77_tokens_is_cut(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = " ".join(["cat"] * 75)
    assert refine(prompt=f"{kept} on a purple mat", out="a.png") == 0
    assert "cut: 'on a purple mat'" in capsys.readouterr().err
    assert refine(prompt=kept, out="b.png") == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(pixels(here / "a.png"), pixels(here / "b.png"))


def test_a_prompt_of_bytes_that_are_no_utf_8(refine: Refine, here: Path) -> None:
    """As a shell may hand over, and Python does as lone surrogates."""
    prompt = os.fsdecode(b"caf\xe9")
    assert refine(prompt=prompt, out="out.png") == 0
    assert texts(here / "out.png")["parameters"].startswith("caf?\n")
    assert settings(here / "out.png")["prompt"] == prompt


# --- the picture that goes in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (8, 24)])
def test_the_smallest_pictures(refine: Refine, here: Path, size: tuple[int, int], guidance_scale: float) -> None:
    """At a latent of 1x1 a group of the UNet's first norm is a single value."""
    Image.new("RGB", size, "green").save("in.png")
    assert refine("in.png", out="out.png", guidance_scale=guidance_scale) == 0
    assert Image.open("out.png").size == size


def test_a_picture_is_cropped_to_multiples_of_8(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (67, 75), "green").save("in.jpg")
    assert refine("in.jpg", out="out.png") == 0
    assert "picture: 67x75, used at 64x72" in capsys.readouterr().out
    assert settings(here / "out.png")["size"] == "64x72"


def test_a_large_picture_is_shrunk(refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes long: the request is all that is looked at."""
    sizes = []

    def look(request: Any, _: Any) -> Any:
        sizes.append(request.image.size)
        raise Stopped

    Image.new("RGB", (1500, 1000), "green").save("in.jpg")
    monkeypatch.setattr(ImageToImagePipeline, "plan_for", staticmethod(look))
    with pytest.raises(Stopped):
        refine("in.jpg")
    assert sizes == [(1248, 832)]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, before the command begins
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\0\0", b"Exif\0\0II"], ids=["wrong", "short"]
)
def test_a_damaged_exif_does_not_matter(
    exif: bytes, refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "green").save("a.jpg", exif=exif)
    assert load_image("a.jpg").info == {}  # nothing of it goes on
    assert refine("a.jpg", out="out.png") == 0
    assert capsys.readouterr().err == ""


def test_the_colours_of_a_phones_photo(refine: Refine, here: Path, photo: Path) -> None:
    """The picture is that of the same photo in sRGB."""
    with Image.open(photo) as image:
        image.save("p3.png", icc_profile=profiles.display_p3())
    load_image("p3.png").save("srgb.png")
    for name in ("p3", "srgb"):
        assert refine(f"{name}.png", out=f"{name}-out.png") == 0
    assert np.array_equal(pixels(here / "p3-out.png"), pixels(here / "srgb-out.png"))
    assert refine(out="plain.png") == 0
    assert not np.array_equal(pixels(here / "p3-out.png"), pixels(here / "plain.png"))


def test_a_damaged_profile_is_told(refine: Refine, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save("a.png", icc_profile=b"hello")
    assert refine("a.png", out="out.png") == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: the colour profile of a.png is damaged")
    assert error.count("\n") == 1


# --- what it leaves -----------------------------------------------------------------------------------------------


def test_the_name_of_the_picture_is_derived(refine: Refine, here: Path) -> None:
    assert refine() == 0
    assert os.listdir(here) == ["photo-refined.png"]


def test_the_latents_are_what_the_picture_was_decoded_from(refine: Refine, here: Path, tiny_refiner_file: Path) -> None:
    assert refine(out="out.png", save_latents="out.safetensors", device="cpu", plain=True) == 0
    assert sorted(os.listdir(here)) == ["out.png", "out.safetensors"]
    with safe_open("out.safetensors", framework="pt") as file:
        latents = file.get_tensor("latents")
        assert file.metadata() == {"sigma": "0.0"}
    assert latents.shape == (1, 4, 8, 8)
    assert latents.dtype == torch.float32
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    with torch.no_grad():
        [decoded] = from_tensor(pipe.decode(latents))
    assert np.array_equal(pixels(here / "out.png"), np.asarray(decoded))


def test_a_watermark_goes_into_the_picture(refine: Refine, here: Path) -> None:
    from sdxl_ref.pictures.watermark import embed

    Image.radial_gradient("L").convert("RGB").save("in.png")  # 256x256
    short = {"steps": 2, "strength": 0.5}
    assert refine("in.png", out="plain.png", **short) == 0
    assert refine("in.png", out="marked.png", watermark=True, **short) == 0
    assert np.array_equal(pixels(here / "marked.png"), np.asarray(embed(load_image("plain.png"))))
    assert settings(here / "marked.png")["watermark"] is True


def test_a_file_without_configuration_is_said_to_be_guessed(
    refine: Refine, here: Path, tiny_refiner_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(tiny_refiner_file), "plain.safetensors")
    assert refine(checkpoint="plain.safetensors") == 0
    note = f"note: no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
    assert capsys.readouterr().out.splitlines()[1] == note


# --- the hash of the file, which is made meanwhile ----------------------------------------------------------------

STOPPED = """
import sys, time
from sdxl_ref.commands import common, refine
def interrupted(*_, **__):
    raise KeyboardInterrupt
common.identity = lambda checkpoint: time.sleep(300)
refine.ImageToImagePipeline.from_pretrained = interrupted
from sdxl_ref.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_stopped_run_does_not_wait_for_the_files_hash(photo: Path, tiny_refiner_file: Path) -> None:
    command = [sys.executable, "-c", STOPPED, "refine", str(photo), "--checkpoint", str(tiny_refiner_file)]
    done = subprocess.run([*command, "--prompt", "a cat"], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (1, "sdxl-ref: stopped\n")


def test_a_file_that_cannot_be_hashed_is_told_before_the_steps(
    refine: Refine, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(checkpoint: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("sdxl_ref.commands.common.identity", broken)
    monkeypatch.setattr(ImageToImagePipeline, "steps", lambda *_: pytest.fail("it went on"))
    assert refine() == 1
    assert capfd.readouterr().err == "sdxl-ref: error: the disk is gone\n"
    assert os.listdir(here) == []


def test_the_settings_tell_the_adapters_by_their_hashes(refine: Refine, here: Path) -> None:
    layer = "lora_unet_middle_block_1_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(64, 1)}
    save_file(factors, "a.safetensors")
    sha256 = [hashlib.sha256((here / "a.safetensors").read_bytes()).hexdigest()]
    assert refine(out="out.png", lora="a.safetensors:0.5") == 0
    assert settings(here / "out.png")["lora_sha256"] == sha256
    assert settings(here / "out.png")["lora"] == ["a.safetensors:0.5"]
    assert readers.web_ui(texts(here / "out.png")["parameters"])["Lora hashes"] == f"a: {sha256[0][:12]}"


def test_a_smallest_strength_that_is_named_works(refine: Refine, here: Path) -> None:
    assert main(refine.words(steps=7, strength=0.1429)) == 0
