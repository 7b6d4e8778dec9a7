"""Fine-tuning that shows: the pocket pair learns another look by a LoRA, in minutes, and still follows its prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdxl_ref import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.cli import main
from sdxl_ref.pocket.distance import patch_distances
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.scenes import PASTEL, USUAL, Look, Scene, draw, random_scene
from sdxl_ref.weights.opening import POCKET
from weights_convert.convert import convert

pytestmark = pytest.mark.full

PICTURES, PROMPTS = 400, 48
LIMIT = 300  # seconds for a fine-tune


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, 1 + i % 2) for i in range(count)]


def drawn(chosen: list[Scene], look: Look, seed: int) -> list[NDArray[Any]]:
    return [draw(scene, np.random.default_rng([seed, i]), look) for i, scene in enumerate(chosen)]


def as_image(picture: NDArray[Any]) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def as_tensor(pictures: list[NDArray[Any]] | NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.stack(list(pictures))).float().permute(0, 3, 1, 2)  # (n,h,w,3) -> (n,3,h,w)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures in the new look; the captions say nothing of it."""
    folder, chosen = tmp_path_factory.mktemp("pastel"), scenes(PICTURES, 21)
    lines = []
    for i, (scene, picture) in enumerate(zip(chosen, drawn(chosen, PASTEL, 22), strict=True)):
        as_image(picture).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": scene.caption, "aesthetic_score": 6.0}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def tuned(kind: str, data: Path, out: Path) -> Path:
    """A LoRA, trained by the command; printed and asserted: that it took less than five minutes."""
    options = {"rank": 16, "layers": ".", "steps": 400, "batch-size": 16, "learning-rate": 2e-3, "weighting": "v"}
    options["device"] = "cpu"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    assert main(["train", "--checkpoint", f"pocket-{kind}", "--data", str(data), "--out", str(out), *words]) == 0
    seconds = time.perf_counter() - began
    print(f"\npocket {kind}: fine-tuned in {seconds:.0f} s")
    assert seconds < LIMIT
    return out / "lora_peft.safetensors"


def paint(pipe: Any, chosen: list[Scene]) -> NDArray[Any]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(chosen))]
    call: dict[str, Any] = {
        "num_inference_steps": 25,
        "guidance_scale": 3.0,
        "output_type": "np",
        "generator": generators,
    }
    return pipe([scene.caption for scene in chosen], **call).images  # type: ignore[no-any-return]


def refine(pipe: Any, chosen: list[Scene]) -> NDArray[Any]:
    """Pictures of the new look, whose details are made anew."""
    found = []
    for i, (scene, picture) in enumerate(zip(chosen, drawn(chosen, PASTEL, 23), strict=True)):
        call: dict[str, Any] = {"num_inference_steps": 40, "strength": 0.3, "guidance_scale": 3.0, "output_type": "np"}
        generator = torch.Generator().manual_seed(i)
        found.append(pipe(scene.caption, image=as_image(picture), generator=generator, **call).images[0])
    return np.stack(found)


def figures(what: str, painted: NDArray[Any], chosen: list[Scene]) -> tuple[int, dict[str, float]]:
    """How many are all right, and how far patches lie from pictures of each look: at all scales, and at the coarsest.

    The coarsest, of 32 px, shows colours and outlines; the finest is led by how sharp a network paints at all.
    """
    right = sum(judge(picture, scene).all_right for picture, scene in zip(painted, chosen, strict=True))
    away: dict[str, float] = {}
    for name, look in (("new", PASTEL), ("usual", USUAL)):
        found = patch_distances(as_tensor(painted), as_tensor(drawn(chosen, look, 24)))
        away |= {name: float(np.mean(list(found.values()))), f"{name}, coarse": found[min(found)]}
    print(f"{what}: {right} of {len(chosen)} all right; distances", {name: round(far, 1) for name, far in away.items()})
    return right, away


@pytest.mark.parametrize(
    ("kind", "pipeline", "make", "nearer"),
    [("base", TextToImagePipeline, paint, 0.8), ("refiner", ImageToImagePipeline, refine, 0.9)],
    ids=["base", "refiner"],
)
def test_a_new_look(kind: str, pipeline: Any, make: Any, nearer: float, data: Path, tmp_path: Path) -> None:
    """Learned: patches lie `nearer` to the new look by that factor, at the coarsest scale by half, and farther from the
    usual one. Prompts are followed: at most 15 % fewer are right.

    The base cannot come to half: to the look that it was trained on it lies at 67, which is 0.58 of its first 116.
    Found: 0.75 (at the coarsest scale 0.27), for the refiner 0.87 (0.36). What is left is at the finest scale, where
    how sharp a network paints at all outweighs the look.
    """
    chosen = scenes(PROMPTS, 25)
    adapter = tuned(kind, data, tmp_path / "out")
    pipe = pipeline.from_pretrained("pocket")
    right, before = figures(f"{kind}, before", make(pipe, chosen), chosen)
    pipe.load_lora_weights(adapter)
    still_right, after = figures(f"{kind}, after", make(pipe, chosen), chosen)
    assert after["new"] < nearer * before["new"]
    assert after["new, coarse"] < 0.5 * before["new, coarse"]
    assert after["usual"] > 1.1 * before["usual"]
    assert after["new"] < after["usual"]
    if kind == "base":  # the refiner is handed pictures of the new look
        assert before["new"] > before["usual"]
    assert still_right >= right - 0.15 * PROMPTS
    check_diffusers(kind, adapter, tmp_path, pipe)


def check_diffusers(kind: str, adapter: Path, folder: Path, ours: Any) -> None:
    """diffusers opens the adapter on the same model and paints the same."""
    import diffusers

    convert(POCKET[f"pocket-{kind}"], folder / "model", "diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    theirs.load_lora_weights(adapter)
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": scenes(1, 27)[0].caption, "num_inference_steps": 10, "output_type": "np"}
    if kind == "refiner":
        call |= {"image": as_image(drawn(scenes(1, 27), PASTEL, 28)[0]), "strength": 0.5}
    else:
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        call |= {"latents": noise, "height": 128, "width": 128}
    expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    found = ours(**call, generator=torch.Generator().manual_seed(1)).images
    print(f"{kind}: largest difference to diffusers with the same adapter {np.abs(found - expected).max():.1e}")
    assert np.abs(found - expected).max() <= 1 / 255
