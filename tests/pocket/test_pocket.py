"""The pair that ships: what it is, that it paints, and that diffusers paints the same with it."""

from __future__ import annotations

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
from sdxl_ref.checkpoint import open_checkpoint
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.hub import POCKET, resolve
from sdxl_ref.pocket.evaluate import vae_quality
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.models import CONFIGS
from sdxl_ref.pocket.scenes import PASTEL, USUAL, Look, Scene, Thing, draw, random_scene
from weights_convert.convert import convert

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
    assert resolve("pocket", "base") == resolve("pocket-base") == POCKET["pocket-base"]
    assert resolve("pocket", "refiner") == resolve("pocket-refiner") == POCKET["pocket-refiner"]
    with pytest.raises(InputError, match="the pocket pair is two models"):
        resolve("pocket")
    with pytest.raises(InputError, match="expected a refiner"):
        ImageToImagePipeline.from_pretrained("pocket-base")


@pytest.fixture(scope="module")
def pair() -> EnsemblePipeline:
    base = TextToImagePipeline.from_pretrained("pocket")
    return EnsemblePipeline(base, ImageToImagePipeline.from_pretrained("pocket", vae=base.vae))


def right(pipe: Any, scenes: list[Scene]) -> int:
    """How many of the scenes' captions are painted all right."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
    captions = [scene.caption for scene in scenes]
    painted = pipe(captions, num_inference_steps=20, guidance_scale=3.0, generator=generators, output_type="np").images
    return sum(judge(picture, scene).all_right for picture, scene in zip(painted, scenes, strict=True))


@pytest.mark.parametrize(("look", "floor"), [(USUAL, 23), (PASTEL, 20)], ids=["usual", "pastel"])
def test_the_autoencoder_keeps_what_a_picture_shows(pair: EnsemblePipeline, look: Look, floor: int) -> None:
    """At least 30 dB, in a look as well that no UNet was trained on; the judge reads nearly all of it."""
    rng = np.random.default_rng(13)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(24)]
    pictures = torch.from_numpy(np.stack([draw(scene, rng, look) for scene in scenes])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        back = (pair.vae.decode(pair.vae.encode(pictures * 2 - 1).mean) / 2 + 0.5).clamp(0, 1)
    right = sum(judge(p, s).all_right for p, s in zip(back.permute(0, 2, 3, 1).numpy(), scenes, strict=True))
    quality = vae_quality(pair.vae, pictures)
    print(f"{quality:.1f} dB, {right} of 24 all right")
    assert quality >= 30
    assert right >= floor


@pytest.mark.parametrize(("things", "floor"), [(1, 13), (2, 11)])
def test_the_ensemble_paints_what_captions_say(pair: EnsemblePipeline, things: int, floor: int) -> None:
    """16 captions; the floors lie far below the figures of sdxl_ref/pocket/README.md, and far above chance."""
    rng = np.random.default_rng(11)
    found = right(pair, [random_scene(rng, things) for _ in range(16)])
    print(f"{things} thing(s): {found} of 16 all right")
    assert found >= floor


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
    assert np.abs(found - expected).max() <= 1 / 255
    assert distance(found, expected) <= 1e-4


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return peers.distance(torch.from_numpy(ours), torch.from_numpy(theirs))


def picture() -> Image.Image:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "plain")
    return Image.fromarray((draw(scene, np.random.default_rng(0)) * 255).astype(np.uint8))


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "prompts painted all right, in " in printed
    assert str(out) in printed
    sheet = Image.open(out)
    assert min(sheet.size) > 3 * 128
    assert json.loads(sheet.text["sdxl_ref"])["seed"] == 0  # type: ignore[attr-defined]
