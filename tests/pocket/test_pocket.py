"""The pair that ships: what it is, that it paints, and that diffusers paints the same with it."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.cli import main
from sdxl_ref.commands import demo
from sdxl_ref.config import InputError
from sdxl_ref.pocket.evaluate import vae_quality
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.models import CONFIGS
from sdxl_ref.pocket.scenes import PASTEL, USUAL, Look, Scene, Thing, draw, random_scene
from sdxl_ref.weights.opening import POCKET, open_checkpoint
from weights_convert.convert import convert

LEVEL = 1 / 255  # of an 8-bit picture
SAME_PICTURE = 1e-4  # relative: ten steps in float32, the same sums in another order
PROMPT = "a red circle above a blue square on a white plain background"


def test_what_ships() -> None:
    """Two files of at most 25 MB in float16, beside the package's code, with one VAE and one OpenCLIP tower."""
    for kind, config in CONFIGS.items():
        path = POCKET[f"pocket-{kind}"]
        assert path.parent == Path(str(files("sdxl_ref"))) / "pocket"
        assert path.stat().st_size <= 25e6
        assert open_checkpoint(path).config == config
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    base, refiner = (load_file(POCKET[f"pocket-{kind}"]) for kind in ("base", "refiner"))
    for ours, theirs in (("first_stage_model.", "first_stage_model."), ("embedders.0.model.", "embedders.1.model.")):
        shared = [key for key in refiner if ours in key]
        assert shared
        assert all(torch.equal(refiner[key], base[key.replace(ours, theirs)]) for key in shared)


def test_names() -> None:
    for kind in CONFIGS:
        assert open_checkpoint("pocket", kind).path == POCKET[f"pocket-{kind}"]
        assert open_checkpoint(f"pocket-{kind}").path == POCKET[f"pocket-{kind}"]
    with pytest.raises(InputError, match="the pocket pair is two models"):
        open_checkpoint("pocket")
    with pytest.raises(InputError, match="expected a base"):
        TextToImagePipeline.from_pretrained("pocket-refiner")


@pytest.fixture(scope="module")
def pair() -> EnsemblePipeline:
    base = TextToImagePipeline.from_pretrained("pocket")
    return EnsemblePipeline(base, ImageToImagePipeline.from_pretrained("pocket", vae=base.vae))


def right(pictures: np.ndarray, scenes: list[Scene]) -> int:
    """How many pictures (n,128,128,3) in [0,1] show their scene, all of it."""
    return [judge(picture, scene).all_right for picture, scene in zip(pictures, scenes, strict=True)].count(True)


@pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("look", "floor"), [(USUAL, 23 / 24), (PASTEL, 20 / 24)], ids=["usual", "pastel"])
def test_the_autoencoder_keeps_what_a_picture_shows(
    pair: EnsemblePipeline, look: Look, floor: float, count: int
) -> None:
    """At least 30 dB, in a look as well that no UNet was trained on; the judge reads nearly all of it."""
    rng = np.random.default_rng(13)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(count)]
    drawn = np.stack([draw(scene, rng, look) for scene in scenes])
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float()  # (n,128,128,3) -> (n,3,128,128)
    with torch.no_grad():
        decoded = (pair.vae.decode(pair.vae.encode(pictures * 2 - 1).mean) / 2 + 0.5).clamp(0, 1)
    kept = right(decoded.permute(0, 2, 3, 1).numpy(), scenes)
    quality = vae_quality(pair.vae, pictures)
    print(f"{quality:.1f} dB, {kept} of {count} all right")
    assert quality >= 30
    assert kept >= floor * count


@pytest.mark.parametrize(("count", "steps"), [(8, 10), pytest.param(16, 20, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("things", "floor"), [(1, 13 / 16), (2, 11 / 16)], ids=["one thing", "two things"])
def test_the_ensemble_paints_what_captions_say(
    pair: EnsemblePipeline, things: int, floor: float, count: int, steps: int
) -> None:
    """The floors lie far below the figures of sdxl_ref/pocket/README.md, and far above chance."""
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng, things) for _ in range(count)]
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    captions = [scene.caption for scene in scenes]
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    painted = right(pair(captions, generator=generators, **options).images, scenes)
    print(f"{things} thing(s): {painted} of {count} all right")
    assert painted >= floor * count


def test_the_caption_decides(pair: EnsemblePipeline) -> None:
    """The same noise under another caption: what was right is wrong for the other."""
    scenes = [Scene((Thing(colour, "circle"),), None, "white", "plain") for colour in ("red", "blue", "green")]
    generators = [torch.Generator().manual_seed(5) for _ in scenes]
    captions = [scene.caption for scene in scenes]
    pictures = pair(captions, num_inference_steps=20, generator=generators, guidance_scale=3.0, output_type="np").images
    marks = [[judge(picture, scene).all_right for scene in scenes] for picture in pictures]
    assert marks == [[i == j for j in range(3)] for i in range(3)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_gives_the_same_pictures(kind: str, tmp_path: Path) -> None:
    """Trained weights, through the key rules into diffusers' folder: 10 steps with guidance, within 1 of 255."""
    import diffusers

    convert(POCKET[f"pocket-{kind}"], tmp_path / "folder", "diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
    if kind == "refiner":
        call |= {"image": picture(), "strength": 0.5}
        ours: Any = ImageToImagePipeline.from_pretrained("pocket")
    else:
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        call |= {"latents": noise, "height": 128, "width": 128}
        ours = TextToImagePipeline.from_pretrained("pocket")
    expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    found = ours(**call, generator=torch.Generator().manual_seed(1)).images
    assert found.shape == expected.shape == (1, 128, 128, 3)
    print(f"{kind}: largest difference {np.abs(found - expected).max():.1e}, relative {distance(found, expected):.1e}")
    assert np.abs(found - expected).max() <= LEVEL
    assert distance(found, expected) <= SAME_PICTURE


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return peers.distance(torch.from_numpy(ours), torch.from_numpy(theirs))


def picture() -> Image.Image:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "plain")
    return Image.fromarray((draw(scene, np.random.default_rng(0)) * 255).astype(np.uint8))


@pytest.mark.parametrize("steps", [4, pytest.param(demo.STEPS, marks=pytest.mark.sweep)])
def test_demo(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "STEPS", steps)
    out = tmp_path / "sheet.png"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "prompts painted all right, in " in printed
    assert str(out) in printed
    sheet = Image.open(out)
    assert min(sheet.size) > 3 * 128
    assert json.loads(sheet.text["sdxl_ref"])["seed"] == 0  # type: ignore[attr-defined]
