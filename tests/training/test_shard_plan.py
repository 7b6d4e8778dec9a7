"""The memory of sharded training, planned from a model's sizes alone, and the README's table of it."""

from pathlib import Path

import pytest
import torch
from training_data import CONFIGS

from sdxl_ref.config import BASE_1_0, REFINER_1_0
from sdxl_ref.training.shard_plan import HELD, largest_gathered, memory_plan, unit_sizes
from sdxl_ref.weights.checkpoint import build, build_empty

README = Path(__file__).parents[2] / "README.md"
OFFICIAL = {"refiner": REFINER_1_0, "base": BASE_1_0}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("processes", [1, 2, 3, 7, 64])
def test_the_first_process_has_the_first_piece_of_each_tensor(kind: str, processes: int) -> None:
    unet = build("unet", CONFIGS[kind])
    pieces = sum(p.chunk(processes)[0].numel() for p in unet.parameters())
    plan = memory_plan(CONFIGS[kind], processes, torch.bfloat16, has_average=True)
    assert (plan.weights, plan.gradients, plan.moments, plan.averaged) == (
        2 * pieces,
        2 * pieces,
        4 * pieces,
        4 * pieces,
    )
    assert plan.total == 12 * pieces + HELD * plan.gathered
    assert memory_plan(CONFIGS[kind], processes, torch.bfloat16, has_average=False).averaged == 0


def test_every_weight_is_in_one_unit() -> None:
    unet = build_empty("unet", BASE_1_0)
    sizes = unit_sizes(unet)
    assert sum(sizes.values()) == sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert max(sizes.values()) < 0.02 * sum(sizes.values())


def test_the_largest_block_of_the_base() -> None:
    """A ResBlock from 1280 + 640 channels to 1280, in the stage that enlarges the map; and what the UNet has itself."""
    c, c_in, text, width = 1280, 1920, 2816, 320
    conv = 9 * c * c + c
    resblock = 2 * c_in + (9 * c_in * c + c) + (c * c + c) + 2 * c + conv + (c_in * c + c)
    stage = 2 * c + 2 * (c * c + c) + conv  # of a transformer the norm and both projections, then the enlarging one
    embedding = (width * c + c) + (c * c + c) + (text * c + c) + (c * c + c)
    out = 2 * width + (9 * width * 4 + 4)
    assert largest_gathered(build_empty("unet", BASE_1_0)) == resblock + stage + embedding + out


def test_the_table_of_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for kind, config in OFFICIAL.items():
        for processes in (2, 4, 8):
            plan = memory_plan(config, processes, torch.float32, has_average=True)
            without_averages = plan.total - plan.averaged
            sizes = [plan.weights, plan.gradients, plan.moments, plan.averaged, plan.gathered, without_averages]
            row = f"| {kind}, {processes} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |"
            print(row)
            assert row in text.splitlines()
