"""The recipe's UNets: the stages of the base and of the refiner, and the sheets of samples on the way."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.pictures.sheets import contact_sheet
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.pocket.autoencoder import trained_autoencoder
from sdxl_ref.pocket.examples import SEED
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.models import zero_residuals
from sdxl_ref.pocket.scenes import random_scene
from sdxl_ref.pocket.stages import SETTINGS, RecipeFolder, part_of
from sdxl_ref.pocket.towers import TOWERS
from sdxl_ref.training.diffusion import Batch, Objective
from sdxl_ref.training.loop import Run
from sdxl_ref.weights.checkpoint import build, prefixes
from sdxl_ref.weights.saving import replacing
from sdxl_ref.weights.stated_config import config_to_json

SAMPLE_EVERY = 2000  # steps
SAMPLES = 24
OBJECTIVES = {  # of a UNet's training, each with its share of a step's pictures
    "base": {Objective(weighting="debiased"): 32},
    "refiner": {Objective(last=199): 32},
    "base-more": {Objective(first=700, weighting="v"): 24, Objective(weighting="v"): 8},  # what is settled first
    "refiner-more": {Objective(last=199, weighting="debiased"): 32},
    "base-last": {Objective(first=700, weighting="v"): 16, Objective(weighting="debiased"): 16},
    "refiner-last": {Objective(last=199, weighting="debiased"): 32},
}


def kind_of(stage: str) -> str:
    """Whether a stage trains the UNet of the "base" or of the "refiner"."""
    return stage.partition("-")[0]


def stages_of(kind: str) -> list[str]:
    """The stages that train the UNet of "base" or "refiner", in order."""
    return [stage for stage in OBJECTIVES if kind_of(stage) == kind]


def train_unet(folder: RecipeFolder, stage: str, stop: int | None = None) -> None:
    """The first stage of each kind begins with a new UNet, the others with the result of the one before."""
    torch.manual_seed(SEED)
    kind = kind_of(stage)
    stages = stages_of(kind)
    earlier = stages[: stages.index(stage)]
    sources = ["towers", "latents"]
    parts = new_parts(folder, kind)
    if earlier:
        parts.load_state_dict(folder.result(earlier[-1]))
        sources.append(earlier[-1])
    parts.to(folder.device)
    latents = folder.result("latents")["latents"]  # (n,4,16,16)
    _, labels = folder.pictures()
    objectives = OBJECTIVES[stage]

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        losses = []
        for objective, count in objectives.items():
            index = torch.randint(len(latents), (count,), generator=generator)
            chosen = [labels[i] for i in index.tolist()]
            numbers = torch.stack([label.numbers(kind) for label in chosen]).to(folder.device)  # (count,k)
            clean = latents[index].to(folder.device).float()
            batch = Batch(clean, [label.caption for label in chosen], numbers)
            losses.append(objective.loss(parts, batch, generator) * count / sum(objectives.values()))
        return torch.stack(losses).sum()

    identity: dict[str, object] = {"model": config_to_json(folder.configs[kind]), "scenes": folder.scenes}
    identity["objectives"] = [[objective.identity, count] for objective, count in objectives.items()]
    identity["learned from"] = folder.hashes(*sources)
    run = Run(parts, SETTINGS[stage], folder.path / stage, identity)

    def paint(step: int) -> None:
        if kind == "base" and step % SAMPLE_EVERY == 0:
            paint_samples(folder, parts, run)

    if folder.train(stage, run, step_loss, stop, paint):
        folder.write_result(stage, parts.state_dict() | run.averaged)


def new_parts(folder: RecipeFolder, kind: str) -> nn.ModuleDict:
    """A new UNet, and the trained towers, frozen."""
    config = folder.configs[kind]
    towers = folder.result("towers")
    parts = nn.ModuleDict({part: build(part, config) for part in prefixes(config) if part != "vae"})
    zero_residuals(parts["unet"])  # type: ignore[arg-type]
    for name in parts:
        if name in TOWERS:
            parts[name].load_state_dict(part_of(towers, name))
            parts[name].requires_grad_(False)
    return parts


def paint_samples(folder: RecipeFolder, parts: nn.ModuleDict, run: Run) -> None:
    """A sheet of pictures by the averaged weights, into the stage's folder, and what the judge finds right in them."""
    averaged_parts: dict[str, Any] = {}
    for name, part in parts.items():
        averaged_parts[name] = deepcopy(part)
        averaged_parts[name].load_state_dict(part.state_dict() | part_of(run.averaged, name))
    pipe = TextToImagePipeline(folder.configs["base"], vae=trained_autoencoder(folder), **averaged_parts)
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(SAMPLES)]  # one thing and two, by turns
    generators = [torch.Generator().manual_seed(i) for i in range(SAMPLES)]
    captions = [scene.caption for scene in scenes]
    pictures = pipe(captions, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    is_right = []
    for picture, scene in zip(pictures, scenes, strict=True):
        is_right.append(judge(np.asarray(picture, dtype=np.float32) / 255, scene).all_right)
    one = is_right[0::2].count(True)
    two = is_right[1::2].count(True)
    tqdm.write(f"step {run.step}: all right {one}/{SAMPLES // 2} with one thing, {two}/{SAMPLES // 2} with two")
    with replacing(run.folder / f"samples_{run.step:06}.png") as beside:
        contact_sheet(pictures, captions).save(beside, format="PNG")
