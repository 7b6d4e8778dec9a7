"""Between the official file and diffusers' folder: bit for bit, both ways, and opened by diffusers itself."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_ref.checkpoint import open_checkpoint
from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.folder import EXTRAS_FILE, open_folder
from weights_convert.cli import main
from weights_convert.convert import convert

KINDS = ["refiner", "base"]


@pytest.fixture(params=KINDS)
def official(request: pytest.FixtureRequest, small_refiner_file: Path, small_base_file: Path, tmp_path: Path) -> Path:
    """A small file with everything that an official one may carry besides its weights."""
    source = small_refiner_file if request.param == "refiner" else small_base_file
    state = load_file(source)
    state["denoiser.sigmas"] = torch.linspace(0, 14, 1000).half()
    state["model_ema.decay"] = torch.tensor(0.5)
    if request.param == "base":
        state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() | {"modelspec.author": "a test"}
    path = tmp_path / "official.safetensors"
    save_file(state, path, metadata)
    return path


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


def test_round_trip_is_bit_identical(official: Path, tmp_path: Path) -> None:
    report = convert(official, tmp_path / "folder", "diffusers")
    assert "which the layout has no place for" in str(report)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "official")
    identical(load_file(official), load_file(tmp_path / "back.safetensors"))
    with safe_open(tmp_path / "back.safetensors", framework="pt") as file:
        metadata = file.metadata()
    kind = open_checkpoint(official).config.kind
    assert metadata["modelspec.architecture"] == f"stable-diffusion-xl-v1-{kind}"
    assert metadata.get("modelspec.timestep_range") == ("0,199" if kind == "refiner" else None)
    assert metadata["modelspec.author"] == "a test"
    assert main(["verify", str(tmp_path / "back.safetensors")]) == 0


def test_a_folder_without_our_extras_gets_the_defaults_and_the_report_says_so(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "folder", "diffusers")
    (tmp_path / "folder" / EXTRAS_FILE).unlink()
    report = str(convert(tmp_path / "folder", tmp_path / "back.safetensors", "official"))
    assert "logit_scale: not in the source, written as ln 100" in report
    assert "denoiser.sigmas: not in the source, written as SDXL's schedule" in report
    back, first = load_file(tmp_path / "back.safetensors"), load_file(official)
    assert back.keys() == {key for key in first if "position_ids" not in key and "model_ema" not in key}
    changed = {key for key in back if not torch.equal(back[key], first[key])}
    assert changed == {"denoiser.sigmas"}
    assert torch.allclose(back["denoiser.sigmas"][-1].float(), torch.tensor(14.6146), atol=1e-2)


def test_diffusers_opens_our_folder_and_gives_our_latents(official: Path, tmp_path: Path) -> None:
    import diffusers

    convert(official, tmp_path / "folder", "diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": "a cup of coffee", "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    if open_checkpoint(official).config.kind == "refiner":
        assert type(theirs).__name__ == "StableDiffusionXLImg2ImgPipeline"
        image = torch.randn(1, 3, 64, 64, generator=generator).clamp(-1, 1)
        arguments |= {"image": image, "strength": 0.5}
        ours: Any = ImageToImagePipeline.from_single_file(tmp_path / "folder")
    else:
        arguments |= {"latents": torch.randn(1, 4, 8, 8, generator=generator), "height": 64, "width": 64}
        ours = TextToImagePipeline.from_single_file(tmp_path / "folder")
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(1)).images
    found = ours(**arguments, generator=torch.Generator().manual_seed(1)).images
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_that_diffusers_wrote_opens_here(
    official: Path, tmp_path: Path, shards: bool, variant: str | None
) -> None:
    import diffusers

    convert(official, tmp_path / "folder", "diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float16)
    size = "3MB" if shards else "10GB"
    pipeline.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)
    indices = list((tmp_path / "theirs").glob("*/*.index*.json"))
    assert bool(indices) == shards
    opened = open_folder(tmp_path / "theirs", variant)
    expected = load_file(official)
    with opened.reader() as get:
        for key in opened.shapes:
            assert torch.equal(get(key), expected[key]), key
    convert(tmp_path / "theirs", tmp_path / "back.safetensors", "official", variant=variant)
    assert open_checkpoint(tmp_path / "back.safetensors").config == open_checkpoint(official).config
    if variant:
        with pytest.raises(InputError, match="there is the variant 'fp16': name it"):
            open_folder(tmp_path / "theirs")


def test_a_variant_is_written_under_its_names(official: Path, tmp_path: Path) -> None:
    import diffusers

    convert(official, tmp_path / "folder", "diffusers", variant="fp16")
    assert (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", variant="fp16", torch_dtype=torch.float16)


def test_a_separate_autoencoder_takes_the_place(official: Path, tmp_path: Path) -> None:
    """In official names, bare and with their prefix, and in diffusers', all the same bits."""
    convert(official, tmp_path / "folder", "diffusers")
    changed = {k: v + 1 for k, v in load_file(official).items() if k.startswith("first_stage_model.")}
    bare = {k.removeprefix("first_stage_model."): v for k, v in changed.items()}
    save_file(changed, tmp_path / "prefixed.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    results = []
    for vae in ("prefixed.safetensors", "bare.safetensors"):
        out = tmp_path / f"with_{vae}"
        convert(official, out, "official", vae=tmp_path / vae)
        results.append(load_file(out))
    convert(tmp_path / "with_bare.safetensors", tmp_path / "folder2", "diffusers")
    convert(official, tmp_path / "third.safetensors", "official", vae=tmp_path / "folder2" / "vae")
    results.append(load_file(tmp_path / "third.safetensors"))
    expected = load_file(official) | changed
    for found in results:
        identical({k: v for k, v in found.items() if k in expected}, expected)


def test_open_clips_own_file_takes_the_place(official: Path, tmp_path: Path) -> None:
    state = load_file(official)
    prefix = next(key for key in state if key.endswith("model.text_projection")).removesuffix("text_projection")
    own = {k.removeprefix(prefix): v.float() * 2 for k, v in state.items() if k.startswith(prefix)}
    renamed = {k if k == "logit_scale" else f"text.{k}": v for k, v in own.items()}
    for name, tensors in (("plain", own), ("newer", renamed)):
        save_file(tensors | {"visual.conv1.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        convert(official, tmp_path / f"out_{name}.safetensors", "official", openclip=tmp_path / f"{name}.safetensors")
        found = load_file(tmp_path / f"out_{name}.safetensors")
        identical({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}, own)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(small_refiner_file: Path, tmp_path: Path) -> Path:
    convert(small_refiner_file, tmp_path / "folder", "diffusers")
    return tmp_path / "folder"


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def vae_names(folder: Path) -> list[str]:
    return list(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))


def test_bad_folders(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_checkpoint(folder)

    shard(folder, dict.fromkeys(vae_names(folder), "part.safetensors"))
    refused("expected one file of weights in .*: remove one")
    weights.rename(folder / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(folder / "elsewhere.safetensors"), "..\\x.safetensors"):
        shard(folder, {"a": name})
        refused("expected a safetensors file in the same folder|which is not there")
    shard(folder, {"a": "part.safetensors"})
    refused("names the shard part.safetensors, which is not there")
    shutil.copy(folder / "elsewhere.safetensors", folder / "vae" / "part.safetensors")
    refused("names 1 tensors that its shards do not hold: a")
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "vae" / "part.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    refused("pickles are not opened")
    shutil.copy(folder / "elsewhere.safetensors", weights)
    open_checkpoint(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("expected a whole safetensors file")


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("unet/config.json", "_class_name", "FluxTransformer2DModel", "the UNet is not SDXL's"),
        ("unet/config.json", "layers_per_block", 3, "missing"),
        ("unet/config.json", "block_out_channels", None, "lacks or garbles a field"),
        ("model_index.json", "text_encoder_2", None, "no SDXL pipeline"),
        ("vae/config.json", "latent_channels", 16, "shape"),
    ],
)
def test_folders_of_another_architecture(folder: Path, file: str, field: str, value: object, message: str) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {field: [None, None] if file == "model_index.json" else value}))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_targets(small_refiner_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target.safetensors"
    target.write_text("precious")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            convert(small_refiner_file, **{"target": target, "to": "official", **options})
        assert target.read_text() == "precious"

    refused("is there already: name another target, or give --force")
    refused("expected an existing, writable folder", target=tmp_path / "no" / "such" / "file")
    refused("expected the layout official or diffusers, found 'onnx'", to="onnx")
    refused("is a file: name a folder", to="diffusers", force=True)
    refused("no such file", vae=tmp_path / "none.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused("needs 0.04 GB, and .* has 0.00 GB free", force=True)
    monkeypatch.undo()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused("No space left on device", force=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"target.safetensors"}
    convert(small_refiner_file, target, "official", force=True)
    assert open_checkpoint(target).config.kind == "refiner"


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_whole_new(
    small_refiner_file: Path, tmp_path: Path, to: str
) -> None:
    """20 kills, spread over the time that a conversion takes; each replaces an older target."""
    target = tmp_path / ("target.safetensors" if to == "official" else "target")
    state = load_file(small_refiner_file)
    with safe_open(small_refiner_file, framework="pt") as file:
        metadata = file.metadata()
    other = tmp_path / "other.safetensors"
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in state.items()}, other, metadata)
    expected = {}
    for name, source in (("old", other), ("new", small_refiner_file)):
        convert(source, tmp_path / f"{name}{target.suffix}", to)
        expected[name] = contents(tmp_path / f"{name}{target.suffix}")
    program = (
        "import sys; from weights_convert.convert import convert; from pathlib import Path; print('go', flush=True);"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], force=True)"
    )
    command = [sys.executable, "-c", program, str(small_refiner_file), str(target), to]
    took, seen = 1.0, set()
    for i in range(21):
        if target.is_dir():
            shutil.rmtree(target)
        convert(other, target, to, force=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            began = time.perf_counter()
            if i == 0:  # undisturbed: how long it takes
                process.wait()
                took = time.perf_counter() - began
            else:
                time.sleep(random.Random(i).uniform(0, 1.1 * took))
                process.kill()
        found = contents(target)
        assert found in (expected["old"], expected["new"])
        seen.add(found == expected["new"])
        left = {path.name for path in tmp_path.iterdir()} - {"other.safetensors", target.name, "old", "new"}
        assert all(name.startswith(".") or name in ("old.safetensors", "new.safetensors") for name in left)
    assert seen == {True, False}  # some kills came before the end, some after


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name[-5:]: path.read_bytes()}
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
