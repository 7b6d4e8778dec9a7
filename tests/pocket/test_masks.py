"""The pocket pair paints a thing in another colour inside a mask, both experts in one run, and the rest stays."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pairs import seeds
from torch import Tensor

from sdxl_ref import EnsemblePipeline
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.scenes import COLOURS, SIZE, Scene, Thing, draw, lay_out, pick, random_scene

MARGIN = 6  # pixels of the mask around the thing; the gap to the other one is at least as much
STRENGTH = 0.75  # the thing's place is kept, its colour is not
BATCH = 32


class Task(NamedTuple):
    """A picture (3,128,128), the mask (128,128) around its first thing, and the scene that is to come of it."""

    picture: Tensor
    mask: Tensor
    wanted: Scene


def task(number: int) -> Task:
    """Two things of different colours, as in training pictures before and after."""
    rng = np.random.default_rng(number)
    while True:
        scene = random_scene(rng, 2)
        first, second = scene.things
        colour = pick(rng, [colour for colour in COLOURS if colour not in (first.colour, second.colour)])
        wanted = replace(scene, things=(Thing(colour, first.shape), second))
        if not wanted.held_out:
            break
    seed = int(rng.integers(1 << 30))
    picture = draw(scene, np.random.default_rng(seed))
    circle = lay_out(scene, np.random.default_rng(seed))[0]  # what `draw` drew from first
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    mask = np.maximum(abs(columns - circle.x), abs(rows - circle.y)) < circle.radius + MARGIN
    return Task(torch.from_numpy(picture).permute(2, 0, 1).float(), torch.from_numpy(mask).float(), wanted)


@pytest.mark.parametrize(("count", "least"), [(16, 0.75), pytest.param(128, 0.85, marks=pytest.mark.sweep)])
def test_a_thing_in_another_colour(count: int, least: float) -> None:
    """`least`: the share that the judge finds right in everything that the caption says."""
    pipe = EnsemblePipeline.from_pretrained("pocket", "pocket")
    right = 0
    for start in range(0, count, BATCH):
        tasks = [task(number) for number in range(start, min(start + BATCH, count))]
        pictures = torch.stack([task.picture for task in tasks])  # (b,3,128,128)
        masks = torch.stack([task.mask for task in tasks])  # (b,128,128)
        painted = pipe(
            [task.wanted.caption for task in tasks],
            image=pictures,
            mask_image=masks,
            strength=STRENGTH,
            num_inference_steps=20,
            generator=seeds(*range(start, start + len(tasks))),
            output_type="pt",
        ).images
        outside = (masks[:, None] == 0).expand_as(painted)
        assert float((painted - pictures)[outside].abs().max()) < 1e-6  # of float32, to [-1, 1] and back
        images = painted.permute(0, 2, 3, 1).numpy()  # (b,3,h,w) -> (b,h,w,3)
        right += sum(judge(image, task.wanted).all_right for image, task in zip(images, tasks, strict=True))
    print(f"{right} of {count} right")
    assert right >= least * count
