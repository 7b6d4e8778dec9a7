"""The model cards' code with the import line changed, on small models served by a hub on the loopback."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import Hub
from PIL import Image

from sdxl_ref import DiffusionPipeline, EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.config import InputError
from sdxl_ref.hub import patterns
from sdxl_ref.on_demand import Moved
from weights_convert.convert import convert

TESTS = Path(__file__).parent
REFINER, BASE = "stabilityai/stable-diffusion-xl-refiner-1.0", "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, small_refiner_file: Path, small_base_file: Path
) -> dict[str, Path]:
    """As the hub has them: with the fp16 variant, and the official file beside."""
    root = tmp_path_factory.mktemp("repositories")
    for name, file in ((REFINER, small_refiner_file), (BASE, small_base_file)):
        folder = root / name.split("/")[1]
        convert(file, folder, "diffusers", variant="fp16")
        (folder / "unet" / "diffusion_pytorch_model.onnx").write_bytes(b"not wanted")
        (folder / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"not wanted")
    return {REFINER: root / REFINER.split("/")[1], BASE: root / BASE.split("/")[1]}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    found = Hub()
    found.repositories |= folders
    yield found
    found.close()


def run(code: str, hub: Hub, cache: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings
    program = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(program, env=environment, capture_output=True, text=True, cwd=cache)


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
    image[0].save("out.png")
"""


def test_the_refiners_card(hub: Hub, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    done = run(REFINER_CARD, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64)
    fetched = {path.split("/")[-1] for path in hub.requests if "/resolve/" in path}
    assert "diffusion_pytorch_model.fp16.safetensors" in fetched
    assert not {name for name in fetched if name.endswith((".onnx", ".bin", ".txt"))}
    again = run(REFINER_CARD, hub, tmp_path, offline=True)  # from the cache
    assert again.returncode == 0, again.stderr[-2000:]


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
    image.save("out.png")
"""


def test_the_bases_card_with_the_ensemble(hub: Hub, tmp_path: Path) -> None:
    done = run(BASE_CARD, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64)


OPEN = "from sdxl_ref import ImageToImagePipeline as P\nP.from_pretrained({!r}, variant={!r})"


@pytest.mark.parametrize(
    ("name", "variant", "offline", "message"),
    [
        ("nobody/nothing", None, False, "could not get nobody/nothing from the hub"),
        (REFINER, "fp16", True, "neither in the cache nor to be had from the hub"),
        (REFINER, None, False, "expected weights as safetensors in"),
        (BASE, "fp16", False, "expected a refiner (one text encoder, aesthetic score), found an SDXL base"),
        ("no such thing", None, False, "no such checkpoint: no such thing: expected a file, a folder, pocket"),
    ],
)
def test_bad_names(name: str, variant: str | None, offline: bool, message: str, hub: Hub, tmp_path: Path) -> None:
    done = run(OPEN.format(name, variant), hub, tmp_path, offline=offline)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert any("InputError" in line and message in line for line in last), done.stderr[-2000:]


FETCH = """
import hashlib, sys
from pathlib import Path
from sdxl_ref import checkpoint
from sdxl_ref.cli import main

if {known}:  # the small file stands in for the official one, whose hash it takes over
    digest = hashlib.sha256(Path({file!r}).read_bytes()).hexdigest()
    checkpoint.KNOWN_FILES.clear()
    checkpoint.KNOWN_FILES[digest] = ("sd_xl_refiner_1.0", "1.0")
sys.exit(main(["fetch", "refiner"]))
"""


@pytest.mark.parametrize("known", [True, False])
def test_fetch_checks_the_hash(known: bool, hub: Hub, tmp_path: Path, small_refiner_file: Path) -> None:
    hub.repositories[REFINER] = repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "sd_xl_refiner_1.0.safetensors").write_bytes(small_refiner_file.read_bytes())
    done = run(FETCH.format(known=known, file=str(small_refiner_file)), hub, tmp_path)
    assert done.returncode == (0 if known else 2), done.stderr[-2000:]
    if known:
        assert "sha256 is the official one" in done.stdout
        assert (tmp_path / "sd_xl_refiner_1.0.safetensors").read_bytes() == small_refiner_file.read_bytes()
    else:
        assert "is not the official file: expected sha256 7440042b" in done.stderr
        assert not (tmp_path / "sd_xl_refiner_1.0.safetensors").exists()


def test_only_what_is_read_is_fetched() -> None:
    wanted = patterns("fp16")
    assert "model_index.json" in wanted
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in wanted
    assert "unet/diffusion_pytorch_model.safetensors" not in wanted
    assert not [name for name in wanted if name.endswith((".bin", "*.safetensors"))] or "-*-of-*" in str(wanted)


def test_local_files_and_folders(folders: dict[str, Path], small_refiner_file: Path) -> None:
    one = ImageToImagePipeline.from_pretrained(folders[REFINER], variant="fp16")
    two = ImageToImagePipeline.from_pretrained(small_refiner_file, torch_dtype=torch.float32)
    for a, b in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(DiffusionPipeline.from_pretrained(folders[BASE], variant="fp16"), TextToImagePipeline)
    assert isinstance(DiffusionPipeline.from_pretrained(small_refiner_file), ImageToImagePipeline)
    with pytest.raises(InputError, match="only safetensors files are opened"):
        ImageToImagePipeline.from_pretrained(small_refiner_file, use_safetensors=False)


def test_parts_of_an_ensemble_can_be_replaced(small_base_file: Path, small_refiner_file: Path) -> None:
    pipe = EnsemblePipeline.from_single_file(small_base_file, small_refiner_file)
    replaced = torch.nn.Identity()
    pipe.unet = replaced
    assert pipe.base.unet is replaced


def test_the_watermark_is_read_back_by_the_packages_own_decoder(small_base_file: Path) -> None:
    from sdxl_ref.watermark import BITS, embed, read

    with Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")) as photo:
        plain = photo.convert("RGB").resize((1024, 1024))
    assert read(embed(plain)) == BITS
    assert sum(a != b for a, b in zip(read(plain), BITS, strict=True)) > 12
    small = plain.resize((512, 512))
    assert sum(a != b for a, b in zip(read(embed(small)), BITS, strict=True)) <= 4  # the method loses some
    difference = np.asarray(embed(plain)).astype(int) - np.asarray(plain)
    assert 0 < np.abs(difference).mean() < 3
    with pytest.raises(InputError, match="needs a picture of 256x256 pixels or more, found 64x64"):
        embed(plain.resize((64, 64)))
    pipe = TextToImagePipeline.from_single_file(small_base_file)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2}
    with pytest.raises(InputError, match='goes into output_type "pil" only'):
        pipe("x", watermark=True, output_type="pt", **arguments)
    called: list[int] = []
    with pytest.raises(InputError, match="256x256"):
        pipe("x", watermark=True, callback_on_step_end=lambda _, i, *__: called.append(i), **arguments)
    assert called == []  # it is found out at the first step


def test_offloading_moves_each_part_in_when_it_works_and_changes_nothing(small_base_file: Path) -> None:
    pipe = TextToImagePipeline.from_single_file(small_base_file)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    plain = pipe("a cup", generator=torch.Generator().manual_seed(0), **arguments).images
    pipe.enable_model_cpu_offload("cpu")
    again = pipe("a cup", generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(plain, again)
    assert isinstance(pipe.unet, Moved)
    assert pipe.unet.slot.loads == ["text_encoder_2", "text_encoder", "unet", "vae"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_offloading_without_a_gpu_says_so_and_goes_on(small_base_file: Path) -> None:
    pipe = TextToImagePipeline.from_single_file(small_base_file)
    unet = pipe.unet
    with pytest.warns(UserWarning, match="there is no cuda device: every part stays where it is"):
        pipe.enable_model_cpu_offload()
    assert pipe.unet is unet


def test_the_cards_compile_line(small_refiner_file: Path) -> None:
    """The whole UNet is one graph, compiled once for a whole run, and gives the same numbers."""
    from torch._dynamo.utils import counters

    pipe = ImageToImagePipeline.from_single_file(small_refiner_file)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    arguments = {"image": image, "num_inference_steps": 8, "strength": 0.5, "output_type": "latent"}
    plain = pipe("a cup", generator=torch.Generator().manual_seed(0), **arguments).images
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
    compiled = pipe("a cup", generator=torch.Generator().manual_seed(0), **arguments).images
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert float((compiled - plain).norm() / plain.norm()) <= 1e-5
