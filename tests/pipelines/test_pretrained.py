"""Opening a model by its name: the model cards' code with the import line changed, folders, files, and wrong names.

A small hub on the loopback serves tiny models under the official names.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import hub as hubs
import numpy as np
import pytest
import torch
from hub import Hub
from PIL import Image

from sdxl_ref import DiffusionPipeline, EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.weights.folder import EXTRAS_FILE
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.convert import convert

REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PARTS = ("unet", "vae", "text_encoder_2")
LOGIT_SCALE = "text_encoder_2.logit_scale"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_refiner_file: Path, tiny_base_file: Path) -> dict[str, Path]:
    """As the hub has them: with the fp16 variant, and the official file beside."""
    root = tmp_path_factory.mktemp("repositories")
    found = {}
    for name, file in ((REFINER, tiny_refiner_file), (BASE, tiny_base_file)):
        folder = root / name.split("/")[1]
        convert(file, folder, "diffusers", variant="fp16")
        (folder / EXTRAS_FILE).unlink()
        (folder / "unet" / "diffusion_pytorch_model.onnx").write_bytes(b"not wanted")
        (folder / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"not wanted")
        found[name] = folder
    return found


# --- the cards ----------------------------------------------------------------------------------------------------

REFINER_CARD = """
    import torch
    from sdxl_ref import ImageToImagePipeline as StableDiffusionXLImg2ImgPipeline, load_image

    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-refiner-1.0", torch_dtype=torch.bfloat16, variant="fp16", use_safetensors=True
    )
    pipe = pipe.to("cpu")
    init_image = load_image("photo.png").convert("RGB")
    prompt = "a photo of an astronaut riding a horse on mars"
    image = pipe(prompt, image=init_image).images
    image[0].save("refined.png")
"""
BASE_CARD = """
    import torch
    from sdxl_ref import DiffusionPipeline

    base = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float32, variant="fp16", use_safetensors=True
    )
    base.to("cpu")
    refiner = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        text_encoder_2=base.text_encoder_2,
        vae=base.vae,
        torch_dtype=torch.float32,
        use_safetensors=True,
        variant="fp16",
    )
    refiner.to("cpu")
    assert refiner.vae is base.vae and refiner.text_encoder_2 is base.text_encoder_2

    n_steps = 10
    high_noise_frac = 0.8
    prompt = "A majestic lion jumping from a big stone at night"
    image = base(
        prompt=prompt, num_inference_steps=n_steps, denoising_end=high_noise_frac, output_type="latent",
        height=64, width=64,
    ).images
    image = refiner(
        prompt=prompt, num_inference_steps=n_steps, denoising_start=high_noise_frac, image=image
    ).images[0]
    image.save("ensemble.png")
"""


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nobody has it": ({"name": "nobody/nothing"}, "could not get nobody/nothing from the hub"),
    "not in the cache": (
        {"name": REFINER, "variant": "fp16", "local_files_only": True, "cache_dir": "empty"},
        "neither in the cache nor to be had from the hub",
    ),
    "no such variant": ({"name": REFINER, "variant": "fp8"}, "there are the variants fp16: name one"),
    "the only variant": ({"name": REFINER}, "opened"),
    "no name": (
        {"name": "no such thing"},
        "no such checkpoint: no such thing: expected a file, a folder, pocket or a repository",
    ),
}
OPEN_ALL = """
    import json
    from sdxl_ref.config import InputError

    for options in json.loads({options!r}):
        try:
            StableDiffusionXLImg2ImgPipeline.from_pretrained(**options)
            print("opened")
        except InputError as error:
            print(str(error).replace(chr(10), " "))
"""


class Asked(NamedTuple):
    """A process that asked the hub: what it left, what it fetched, what it printed."""

    folder: Path
    fetched: set[str]
    lines: list[str]


@pytest.fixture(scope="module")
def asked(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Both cards as they stand, and then the wrong names."""
    folder = tmp_path_factory.mktemp("asked")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    hub = Hub()
    hub.repositories |= folders
    wrong = OPEN_ALL.format(options=json.dumps([options for options, _ in WRONG.values()]))
    done = hubs.run(REFINER_CARD + BASE_CARD + wrong, hub, folder)
    hub.close()
    assert done.returncode == 0, done.stderr[-2000:]
    fetched = {path.split("/")[-1] for path in hub.requests if "/resolve/" in path}
    return Asked(folder, fetched, done.stdout.splitlines())


@pytest.mark.filterwarnings("ignore:the variant 'fp16' is not used")  # on files under the names of repositories
@pytest.mark.parametrize("name", ["refined.png", "ensemble.png"])
def test_the_cards_run_as_they_stand(name: str, asked: Asked) -> None:
    with Image.open(asked.folder / name) as picture:
        assert picture.size == (64, 64)


def test_only_what_is_read_is_fetched(asked: Asked) -> None:
    assert "diffusion_pytorch_model.fp16.safetensors" in asked.fetched
    assert not {name for name in asked.fetched - {"merges.txt"} if name.endswith((".onnx", ".bin", ".txt"))}
    assert "diffusion_pytorch_model.safetensors" not in asked.fetched


def test_without_a_hub_the_cache_serves(asked: Asked, folders: dict[str, Path]) -> None:
    options: dict[str, Any] = {"cache_dir": asked.folder / "hub", "local_files_only": True, "variant": "fp16"}
    cached = ImageToImagePipeline.from_pretrained(REFINER, **options)
    assert cached.checkpoint is not None
    assert cached.checkpoint.path.is_relative_to(asked.folder)
    assert equal(cached, ImageToImagePipeline.from_pretrained(folders[REFINER], variant="fp16"))


# --- wrong names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("i", "name"), list(enumerate(WRONG)))
def test_a_wrong_name_says_what_is_wrong(i: int, name: str, asked: Asked) -> None:
    assert len(asked.lines) == len(WRONG)
    assert WRONG[name][1] in asked.lines[i]


def test_a_variant_of_a_file_is_told() -> None:
    with pytest.warns(UserWarning, match="the variant 'fp16' is not used: .*pocket_base.safetensors is no folder"):
        open_checkpoint("pocket-base", variant="fp16")


def test_the_vae_of_a_pocket_model() -> None:
    own = open_checkpoint("pocket-base").load("vae").state_dict()
    borrowed = open_checkpoint("pocket-base", vae="pocket-refiner").load("vae").state_dict()
    refiners = open_checkpoint("pocket-refiner").load("vae").state_dict()
    assert all(torch.equal(borrowed[key], refiners[key]) for key in own)


def test_pocket_alone_is_two_models() -> None:
    with pytest.raises(InputError, match="two models: expected one of pocket-base, pocket-refiner, found pocket"):
        open_checkpoint("pocket")
    assert open_checkpoint("pocket", "base").path == open_checkpoint("pocket-base").path
    assert open_checkpoint("pocket-refiner").config.kind == "refiner"


# --- what is on the disk ------------------------------------------------------------------------------------------


def equal(one: ImageToImagePipeline, other: ImageToImagePipeline) -> bool:
    """Whether all their weights are; but for `logit_scale`, for which folders have no place."""
    states = [
        {f"{part}.{key}": tensor for part in PARTS for key, tensor in getattr(pipe, part).state_dict().items()}
        for pipe in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0].keys() - {LOGIT_SCALE})


def test_a_folder_and_its_file_are_one_model(folders: dict[str, Path], tiny_refiner_file: Path) -> None:
    folder = ImageToImagePipeline.from_pretrained(folders[REFINER], variant="fp16")
    assert equal(folder, ImageToImagePipeline.from_pretrained(tiny_refiner_file, torch_dtype=torch.float32))


def test_diffusion_pipeline_opens_what_the_files_are(folders: dict[str, Path], tiny_refiner_file: Path) -> None:
    assert isinstance(DiffusionPipeline.from_pretrained(folders[BASE], variant="fp16"), TextToImagePipeline)
    assert isinstance(DiffusionPipeline.from_pretrained(tiny_refiner_file), ImageToImagePipeline)


def test_an_open_checkpoint_is_taken_as_it_is(tiny_refiner_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kind is found out before anything is read."""
    opened = ImageToImagePipeline.open(tiny_refiner_file)
    assert ImageToImagePipeline.from_pretrained(opened).checkpoint is opened
    monkeypatch.setattr(type(opened), "load", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InputError, match=f"expected a base .*, found an SDXL refiner: .*{tiny_refiner_file.name}"):
        TextToImagePipeline.from_pretrained(opened)


def test_the_wrong_kind_of_model(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    """The ensemble finds a wrong one out before a weight is read; a base may stand for a refiner on a picture."""
    with pytest.raises(InputError, match="expected a base"):
        TextToImagePipeline.from_pretrained(tiny_refiner_file)
    with pytest.raises(InputError, match=f"expected a refiner .*, found an SDXL base: .*{tiny_base_file.name}"):
        EnsemblePipeline.from_pretrained(tiny_base_file, tiny_base_file)
    assert ImageToImagePipeline.from_pretrained(tiny_base_file).config.kind == "base"


def test_pickles_are_not_asked_for(tiny_refiner_file: Path) -> None:
    with pytest.raises(InputError, match="only safetensors files are opened"):
        ImageToImagePipeline.from_pretrained(tiny_refiner_file, use_safetensors=False)


@pytest.mark.parametrize(
    ("word", "near"), [("torch_dtyp", "torch_dtype"), ("vea", "vae"), ("low_mem", None), ("parts", None)]
)
def test_a_misspelt_option_is_answered_with_the_nearest(word: str, near: str | None, tiny_refiner_file: Path) -> None:
    options: dict[str, Any] = {word: torch.nn.Identity()}
    hint = f"unknown argument '{word}': " + (f"did you mean '{near}'" if near else "expected one of unet, vae, ")
    with pytest.raises(TypeError, match=f"ImageToImagePipeline: {hint}"):
        ImageToImagePipeline.from_pretrained(tiny_refiner_file, **options)


def test_a_misspelt_option_of_the_ensemble(tiny_base_file: Path, tiny_refiner_file: Path) -> None:
    with pytest.raises(TypeError, match="unknown argument 'varient': did you mean 'variant'"):
        EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, varient=None)


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_the_dtype_leaves_the_vae_in_float32(option: str, tiny_refiner_file: Path) -> None:
    options: dict[str, Any] = {option: torch.bfloat16}
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, **options)
    assert pipe.dtype == torch.bfloat16
    assert next(pipe.text_encoder_2.parameters()).dtype == torch.bfloat16
    assert next(pipe.vae.parameters()).dtype == torch.float32
