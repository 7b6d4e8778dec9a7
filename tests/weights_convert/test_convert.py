"""Between the official file and diffusers' folder: bit for bit, both ways, and opened by diffusers itself."""

import json
import math
import os
import random
import re
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
from weights_convert.reports import own_hash
from weights_convert.stream import EMPTY_HASH, HASH_KEY

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


@pytest.mark.parametrize("own", [2.5, None], ids=["with a scale", "without"])
@pytest.mark.parametrize("there", [True, False], ids=["into one with", "into one without"])
@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_open_clips_scale_is_carried_where_it_has_one(
    small_refiner_file: Path, tmp_path: Path, own: float | None, there: bool, to: str
) -> None:
    prefix = "conditioner.embedders.0.model."
    state = load_file(small_refiner_file)
    tower = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    first = float(tower.pop("logit_scale"))
    save_file(tower | ({} if own is None else {"logit_scale": torch.tensor(own)}), tmp_path / "clip.safetensors")
    with safe_open(small_refiner_file, framework="pt") as file:
        metadata = file.metadata()
    source = {key: value for key, value in state.items() if there or not key.endswith("logit_scale")}
    save_file(source, tmp_path / "source.safetensors", metadata)
    target = tmp_path / ("out.safetensors" if to == "official" else "out")
    report = str(convert(tmp_path / "source.safetensors", target, to, openclip=tmp_path / "clip.safetensors"))
    assert ("logit_scale: not in" in report) == (own is None)
    assert (f"{prefix}logit_scale: not in the source, written as ln 100" in report) == (
        own is None and not there and to == "official"
    )
    opened = open_checkpoint(target)
    expected = own or (first if there else math.log(100) if to == "official" else None)
    assert (prefix + "logit_scale" in opened.shapes) == (expected is not None)
    if expected is not None:
        with opened.reader() as get:
            assert float(get(prefix + "logit_scale")) == pytest.approx(expected, rel=1e-3)


def test_float8_goes_there_and_back(small_refiner_file: Path, tmp_path: Path) -> None:
    kinds = {"model.diffusion_model.": torch.float8_e4m3fn, "first_stage_model.": torch.float8_e5m2}
    state = {
        key: value.to(next((dtype for prefix, dtype in kinds.items() if key.startswith(prefix)), value.dtype))
        for key, value in load_file(small_refiner_file).items()
    }
    with safe_open(small_refiner_file, framework="pt") as file:
        save_file(state, tmp_path / "small.safetensors", file.metadata())
    convert(tmp_path / "small.safetensors", tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "official")
    back = load_file(tmp_path / "back.safetensors")
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key].float(), value.float()), key
    assert main(["verify", str(tmp_path / "back.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "small.safetensors"), str(tmp_path / "folder")]) == 0


def test_the_hash_goes_into_its_own_field(small_refiner_file: Path, tmp_path: Path) -> None:
    """Fields before it that say what stands in its place until it is known keep what they say."""
    with safe_open(small_refiner_file, framework="pt") as file:
        metadata = file.metadata() | {"a.note": EMPTY_HASH, "a.quote": f'"{HASH_KEY}":"{EMPTY_HASH}"'}
    save_file(load_file(small_refiner_file), tmp_path / "source.safetensors", metadata)
    convert(tmp_path / "source.safetensors", tmp_path / "out.safetensors", "official")
    found = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert {name: found[name] for name in metadata} == metadata
    assert found[HASH_KEY] != EMPTY_HASH
    [verdict] = own_hash(open_checkpoint(tmp_path / "out.safetensors"))
    assert verdict.holds


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


OTHERS = [  # file, field, value, what is said of it
    ("unet/config.json", "layers_per_block", 3, "missing"),
    ("unet/config.json", "block_out_channels", None, "lacks or garbles a field"),
    ("vae/config.json", "latent_channels", 16, "shape"),
    ("model_index.json", "unet", [None, None], "no SDXL pipeline: expected unet .*, found .None, None."),
    ("model_index.json", "vae", ["diffusers", "AutoencoderTiny"], "no SDXL pipeline: expected vae"),
    ("model_index.json", "text_encoder_2", [None, None], "no SDXL pipeline: expected text_encoder_2"),
    ("model_index.json", "text_encoder_2", None, "no SDXL pipeline: expected text_encoder_2"),
    ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "expected prediction_type 'epsilon'"),
    *(
        (f"{part}/config.json", field, value, f"{part}/config.json is not SDXL's: expected {field} .*, found ")
        for part, field, value in (
            ("unet", "_class_name", "FluxTransformer2DModel"),
            ("unet", "norm_num_groups", 16),
            ("unet", "act_fn", "gelu"),
            ("unet", "attention_head_dim", 8),
            ("unet", "up_block_types", ["UpBlock2D"] * 4),
            ("unet", "use_linear_projection", None),
            ("unet", "resnet_time_scale_shift", "scale_shift"),
            ("vae", "_class_name", "AutoencoderTiny"),
            ("vae", "norm_num_groups", 16),
            ("vae", "act_fn", "relu"),
            ("vae", "latents_mean", [0.1, 0.2, 0.3, 0.4]),
            ("text_encoder_2", "intermediate_size", 128),
            ("text_encoder_2", "vocab_size", 30000),
            ("text_encoder_2", "max_position_embeddings", 512),
            ("text_encoder_2", "layer_norm_eps", 1e-6),
        )
    ),
]


def test_folders_of_another_architecture(folder: Path) -> None:
    """Each field alone, in a folder that opens without the change."""
    for file, field, value, message in OTHERS:
        text = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(text) | {field: value}))
        with pytest.raises(InputError, match=message):
            open_checkpoint(folder)
        (folder / file).write_text(text)
    config = json.loads((folder / "unet" / "config.json").read_text())
    absent = {key: value for key, value in config.items() if key not in ("act_fn", "norm_num_groups")}
    said = {"dual_cross_attention": None, "only_cross_attention": None, "class_embed_type": None}  # as the hub's say it
    (folder / "unet" / "config.json").write_text(json.dumps(absent | said))
    assert open_checkpoint(folder).config.kind == "refiner"


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.bias", "unet.conv_in.weight"]
)
def test_the_file_of_extras_holds_nothing_else(folder: Path, name: str) -> None:
    """A tensor in it would stand in for that of the part, unseen."""
    extras = load_file(folder / EXTRAS_FILE)
    save_file(extras | {name: torch.zeros(1)}, folder / EXTRAS_FILE)
    with pytest.raises(InputError, match=f"{EXTRAS_FILE} holds {name}, expected what the parts have no place for"):
        open_checkpoint(folder)
    save_file(extras | {"denoiser.sigmas": torch.zeros(1000)}, folder / EXTRAS_FILE)
    assert "denoiser.sigmas" in open_checkpoint(folder).shapes


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


def test_force_replaces_models_alone(small_refiner_file: Path, folder: Path, tmp_path: Path) -> None:
    other, precious = tmp_path / "other", tmp_path / "precious.safetensors"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    precious.write_text("precious")
    (tmp_path / "link.safetensors").symlink_to(precious)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")

    def refused(source: Path, target: Path, to: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            convert(source, target, to, force=True)

    for to in ("official", "diffusers"):
        refused(small_refiner_file, other, to, "is a folder that holds other things than a model")
        for name in ("link.safetensors", "circle", "pipe"):
            refused(small_refiner_file, tmp_path / name, to, "is a link or a device")
    refused(small_refiner_file, folder, "official", "is a folder: name a file")
    refused(folder, folder / "unet", "diffusers", "lie one inside the other")
    refused(folder / "unet" / "..", tmp_path, "diffusers", "lie one inside the other")
    assert (other / "letter.txt").read_text() == "dear"
    assert precious.read_text() == "precious"
    assert open_checkpoint(folder).config.kind == "refiner"


@pytest.mark.parametrize("name", [".", "/", "..", "x" * 300, "x" * 300 + "/y"])
def test_targets_without_a_name_of_their_own_or_with_too_long_a_one(
    small_refiner_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(small_refiner_file)
    for words in (
        ["convert", source, name, "--to", "official", "--force"],
        ["convert", source, name, "--to", "diffusers"],
        ["convert", source, "out.safetensors", "--to", "official", "--vae", "x" * 300],
        ["convert", "x" * 300, name, "--to", "official"],
        ["inspect", "x" * 300],
    ):
        assert main(words) == 2
        assert re.fullmatch("weights-convert: error: .+\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_name_of_255_bytes_is_written(small_refiner_file: Path, tmp_path: Path) -> None:
    target = tmp_path / ("猫" * 81 + ".safetensors")
    convert(small_refiner_file, target, "official")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_dtypes_that_no_weights_have(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One tensor of a part is of unsigned whole numbers, as its header says."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"', 1))
    name = next(key for key, value in load_file(path).items() if value.dtype == torch.uint16)
    for words in (
        ["inspect", folder],
        ["inspect", folder / "vae"],
        ["verify", folder],
        ["diff", folder, folder],
        ["convert", folder, tmp_path / "out.safetensors", "--to", "official"],
        ["lora", "extract", folder, folder, "--rank", "1", "--out", tmp_path / "out.safetensors"],
    ):
        assert main([str(word) for word in words]) == 2, words
        assert f"{name} has the dtype U16, expected one of F64, F32, F16" in capsys.readouterr().err


def test_a_separate_autoencoder_of_such_a_dtype(
    small_refiner_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"', 1))
    words = ["convert", small_refiner_file, tmp_path / "out.safetensors", "--to", "official", "--vae", path]
    assert main([str(word) for word in words]) == 2
    assert "has the dtype torch.uint16, expected one of F64" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


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
