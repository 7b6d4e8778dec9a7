"""`--vae` and `vae=`: an autoencoder from a file or folder, where a checkpoint has none and in place of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import checkpoints
import peers
import pytest
import torch
from cases import sample
from checkpoints import REFINER, metadata, parts_of, sparse_file, write
from command_line import Refine, assert_one_line, pixels, settings
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_ref import DiffusionPipeline, EnsemblePipeline, ImageToImagePipeline
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import CONFIG_KEY
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.identity import vae_name
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from sdxl_ref.weights.stated_config import config_to_json
from weights_convert.convert import convert

PREFIX = "first_stage_model."
DECODED = 1e-5  # float32, one network: what sums in another order leave
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def other() -> Any:
    """The autoencoder to put in: of the model's sizes, with other weights."""
    return peers.randomise(parts_of(REFINER)["vae"], seed=7)


@pytest.fixture(scope="module")
def places(other: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same autoencoder in every form that it is published in."""
    folder = tmp_path_factory.mktemp("vae")
    own = other.state_dict()
    theirs = peers.diffusers_vae(other)
    old = dict(theirs.state_dict())
    for new_name, old_name in OLD.items():
        old = {key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): t for key, t in old.items()}
    matrices = {key: t[:, :, 0, 0].contiguous() if "attn_1" in key and t.ndim == 4 else t for key, t in own.items()}
    strays = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
    theirs.save_pretrained(folder / "folder")
    parts = {**parts_of(REFINER), "vae": other}
    save_checkpoint(folder / "whole.safetensors", REFINER, parts, torch.float32)
    convert(folder / "whole.safetensors", folder / "pipeline", "diffusers")
    (folder / "one").mkdir()
    return {
        "a plain file": write(folder / "plain.safetensors", own),
        "a plain file with strays": write(folder / "strays.safetensors", own | strays),
        "a plain file with matrices": write(folder / "matrices.safetensors", matrices),
        "a file with the official prefix": write(folder / "p.safetensors", {PREFIX + k: t for k, t in own.items()}),
        "a file in diffusers' names": write(folder / "theirs.safetensors", theirs.state_dict()),
        "a file in diffusers' old names": write(folder / "old.safetensors", old),
        "a folder of the VAE": folder / "folder",
        "a folder with one file": write(folder / "one" / "vae.safetensors", own).parent,
        "a pipeline's folder": folder / "pipeline",
        "a whole checkpoint": folder / "whole.safetensors",
    }


FORMS = (
    "a plain file",
    "a plain file with strays",
    "a plain file with matrices",
    "a file with the official prefix",
    "a file in diffusers' names",
    "a file in diffusers' old names",
    "a folder of the VAE",
    "a folder with one file",
    "a pipeline's folder",
    "a whole checkpoint",
)


def without_vae(path: Path, folder: Path, prefix: str = "") -> Path:
    state = {prefix + key: t for key, t in load_file(path).items() if not key.startswith(PREFIX)}
    return write(folder / "without.safetensors", state, metadata())


def same(network: Any, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("form", sample(FORMS, *FORMS[::2]))
def test_every_form_completes_a_file_and_replaces_its_own(
    form: str, places: dict[str, Path], other: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    own = open_checkpoint(files["refiner"])
    for path in (without_vae(files["refiner"], tmp_path), files["refiner"]):
        found = open_checkpoint(path, vae=places[form])
        assert same(found.load("vae"), other.state_dict())
        assert same(found.load("unet"), own.load("unet").state_dict())
        assert found.config == REFINER
        assert found.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()  # of the checkpoint itself
        hashes = [hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(other.state_dict().items())))]
        assert vae_name(found, found.sha256()).endswith(f", tensors sha256 {hashes[0].hexdigest()}")


@pytest.mark.parametrize("form", FORMS[2::3])
def test_a_conversion_takes_every_form_too(
    form: str, places: dict[str, Path], other: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    convert(files["refiner"], tmp_path / "out.safetensors", "official", vae=places[form])
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[PREFIX + key], tensor) for key, tensor in other.state_dict().items())


def test_diffusers_decodes_the_same(places: dict[str, Path], files: dict[str, Path]) -> None:
    """From the folder that diffusers wrote itself."""
    peer = AutoencoderKL.from_pretrained(places["a folder of the VAE"])
    ours: Any = open_checkpoint(files["refiner"], vae=places["a file in diffusers' names"]).load("vae")
    z = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert peers.distance(ours.decode(z), peer.decode(z).sample) < DECODED


def test_a_folder_says_how_latents_are_scaled(places: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    """diffusers takes the scale of the autoencoder that it is given; a file says none, and the model's stays."""
    peer = AutoencoderKL.from_pretrained(places["a folder of the VAE"])
    peer.register_to_config(scaling_factor=0.5)
    peer.save_pretrained(tmp_path / "scaled")
    assert open_checkpoint(files["refiner"], vae=tmp_path / "scaled").config.vae.scale_factor == 0.5
    assert open_checkpoint(files["refiner"], vae=places["a plain file"]).config.vae == REFINER.vae


def test_a_folder_as_the_model(places: dict[str, Path], other: Any, files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["refiner"], tmp_path / "model", "diffusers")
    model = open_checkpoint(tmp_path / "model")
    found = open_checkpoint(tmp_path / "model", vae=places["a plain file"])
    assert same(found.load("vae"), other.state_dict())
    assert found.sha256() == model.sha256()


def test_a_file_with_a_prefix_is_completed(
    places: dict[str, Path], other: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    path = without_vae(files["refiner"], tmp_path, "state_dict.")
    assert same(open_checkpoint(path, vae=places["a plain file"]).load("vae"), other.state_dict())


def test_vae_takes_a_path_in_python(
    places: dict[str, Path], other: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    path = without_vae(files["refiner"], tmp_path)
    for vae in (places["a plain file"], str(places["a folder of the VAE"])):
        assert same(ImageToImagePipeline.from_pretrained(path, vae=vae).vae, other.state_dict())
        assert same(DiffusionPipeline.from_pretrained(path, vae=vae).vae, other.state_dict())
    open_already = open_checkpoint(files["refiner"])
    pipe = ImageToImagePipeline.from_pretrained(open_already, vae=places["a plain file"])
    assert same(pipe.vae, other.state_dict())


def test_an_ensemble_decodes_by_it(tmp_path: Path) -> None:
    states = {kind: load_file(POCKET[f"pocket-{kind}"]) for kind in ("base", "refiner")}
    vae = {key.removeprefix(PREFIX): t + 0.5 for key, t in states["base"].items() if key.startswith(PREFIX)}
    path = write(tmp_path / "vae.safetensors", vae)
    pair = EnsemblePipeline.from_pretrained("pocket-base", "pocket-refiner", vae=path)
    assert pair.base.vae is pair.refiner.vae
    assert same(pair.vae, {key: t.float() for key, t in vae.items()})


# --- what does not go ---------------------------------------------------------------------------------------------


def line_of(vae: Path, files: dict[str, Path]) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(files["refiner"], vae=vae)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_what_is_no_autoencoder_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    assert line_of(tmp_path / "none", files).startswith(
        f"no such checkpoint: {tmp_path}/none: expected a file, a folder, pocket or a repository"
    )
    adapter = sparse_file(tmp_path / "lora.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.alpha": ()})
    assert "lora.safetensors is an adapter (LoRA): expected an SDXL autoencoder" in line_of(adapter, files)
    unknown = sparse_file(tmp_path / "unknown.safetensors", {"a": (1,)})
    assert "unknown.safetensors is no autoencoder: expected an SDXL autoencoder" in line_of(unknown, files)
    (tmp_path / "vae.ckpt").write_bytes(b"")
    assert "vae.ckpt is a pickle, which can run any code" in line_of(tmp_path / "vae.ckpt", files)
    (tmp_path / "empty").mkdir()
    assert "expected one .safetensors file in the folder" in line_of(tmp_path / "empty", files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.mid.attn_1.q.weight": None}, "lacks encoder.mid.attn_1.q.weight of an autoencoder"),
        ({"decoder.conv_out.weight": None}, "is no whole autoencoder"),
        (
            {"decoder.norm_out.weight": torch.zeros(5)},
            "decoder.norm_out.weight is 5 in F32: expected 32 in floating point",
        ),
        (
            {"decoder.norm_out.bias": torch.zeros(32, dtype=torch.int8)},
            "decoder.norm_out.bias is 32 in I8: expected 32",
        ),
    ],
)
def test_an_autoencoder_that_is_not_whole(
    change: dict[str, Tensor | None], message: str, other: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    state = {key: tensor for key, tensor in (other.state_dict() | change).items() if tensor is not None}
    assert message in line_of(write(tmp_path / "vae.safetensors", state), files)


def test_an_autoencoder_of_other_latents(files: dict[str, Path], tmp_path: Path) -> None:
    """As SD 3's and Flux's, of 16 channels."""
    config = checkpoints.replace(REFINER, vae=checkpoints.replace(REFINER.vae, z_channels=16, embed_dim=16))
    vae = parts_of(config)["vae"]
    line = line_of(write(tmp_path / "vae.safetensors", vae.state_dict()), files)
    assert "channels of the VAE: expected (4, 3, 3), found (16, 3, 3)" in line


def test_a_folder_of_another_autoencoder(places: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    peer = AutoencoderKL.from_pretrained(places["a folder of the VAE"])
    peer.register_to_config(shift_factor=0.1159)  # Flux's
    peer.save_pretrained(tmp_path / "flux")
    assert "is not SDXL's: expected shift_factor None, found 0.1159" in line_of(tmp_path / "flux", files)


# --- on the command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket_vae(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pocket pair without its autoencoder, the autoencoder alone, and one whose pictures are darker."""
    folder = tmp_path_factory.mktemp("pocket")
    found = {}
    for kind in ("base", "refiner"):
        state = load_file(POCKET[f"pocket-{kind}"])
        texts = {CONFIG_KEY: config_to_json(open_checkpoint(f"pocket-{kind}").config)}
        rest = {key: t for key, t in state.items() if not key.startswith(PREFIX)}
        found[kind] = write(folder / f"{kind}.safetensors", rest, texts)
    vae = {key.removeprefix(PREFIX): t for key, t in state.items() if key.startswith(PREFIX)}
    darker = vae | {"decoder.conv_out.bias": vae["decoder.conv_out.bias"] - 0.5}
    found |= {"vae": write(folder / "vae.safetensors", vae), "darker": write(folder / "darker.safetensors", darker)}
    return found


def test_refine_with_a_vae(
    pocket_vae: dict[str, Path], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A completed file makes the whole one's picture; another VAE another one, which the settings tell."""
    refine = Refine(photo, POCKET["pocket-refiner"])
    assert refine(out=tmp_path / "whole.png") == 0
    assert refine(checkpoint=pocket_vae["refiner"], vae=pocket_vae["vae"], out=tmp_path / "completed.png") == 0
    assert refine(vae=pocket_vae["darker"], out=tmp_path / "darker.png") == 0
    assert (pixels(tmp_path / "whole.png") == pixels(tmp_path / "completed.png")).all()
    difference = pixels(tmp_path / "whole.png").astype(float) - pixels(tmp_path / "darker.png")
    assert difference.mean() > 20
    told = settings(tmp_path / "darker.png")["checkpoint"]
    assert told["sha256"] == settings(tmp_path / "whole.png")["checkpoint"]["sha256"]
    digest = hashlib.sha256(pocket_vae["darker"].read_bytes()).hexdigest()
    assert told["vae"].startswith(f"darker.safetensors, file sha256 {digest}, tensors sha256 ")
    capsys.readouterr()
    assert refine(checkpoint=pocket_vae["refiner"], out=tmp_path / "none.png") == 2
    assert_one_line(capsys.readouterr().err, "holds no VAE: give one as --vae FILE, or vae= in Python")
    assert refine(vae=pocket_vae["vae"], out=pocket_vae["vae"]) == 2  # what is read is not written
    assert_one_line(capsys.readouterr().err, "it is read: choose another place")


def test_an_ensembles_refiner_needs_no_vae(pocket_vae: dict[str, Path]) -> None:
    pair = EnsemblePipeline.from_pretrained("pocket-base", pocket_vae["refiner"])
    assert pair.refiner.vae is pair.base.vae


def test_generate_with_a_vae(pocket_vae: dict[str, Path], tmp_path: Path) -> None:
    """It is the base's; a refiner's own is not needed."""
    words = ["generate", "--prompt", "a red circle", "--steps", "5", "--width", "64", "--height", "64", "--out"]
    assert main([*words, str(tmp_path / "a.png"), "--base", "pocket", "--refiner", "pocket"]) == 0
    pair = ["--base", str(pocket_vae["base"]), "--refiner", str(pocket_vae["refiner"])]
    assert main([*words, str(tmp_path / "b.png"), *pair, "--vae", str(pocket_vae["vae"])]) == 0
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_convert_completes_a_file(pocket_vae: dict[str, Path], tmp_path: Path) -> None:
    convert(pocket_vae["refiner"], tmp_path / "whole.safetensors", "official", vae=pocket_vae["vae"])
    expected = load_file(POCKET["pocket-refiner"])
    found = load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:the variant 'fp16' is not used")  # of the model, which is a file
def test_a_variant_is_that_of_the_vae_too(files: dict[str, Path], tmp_path: Path) -> None:
    """A folder with a plain file and one of fp16, of other values."""
    convert(files["refiner"], tmp_path / "both", "diffusers")
    [plain] = (tmp_path / "both" / "vae").glob("*.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(plain).items()}
    save_file(zeros, plain.with_name(f"{plain.stem}.fp16.safetensors"))
    for variant, is_zero in (("fp16", True), (None, False)):
        found = open_checkpoint(files["refiner"], vae=tmp_path / "both", variant=variant).load("vae")
        assert all(not tensor.any() for tensor in found.state_dict().values()) is is_zero
