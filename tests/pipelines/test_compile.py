"""`pipe.unet = torch.compile(pipe.unet, …)`, as the model card writes it."""

from typing import Any

import pairs
import pytest
import torch
from pairs import seeded

COMPILED = 1e-5  # relative, float32: fused kernels sum in another order


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"backend": "eager"}, id="the graph"),
        pytest.param({"mode": "reduce-overhead"}, id="the card's line", marks=pytest.mark.sweep),  # a minute
    ],
)
def test_the_unet_is_one_graph_compiled_once_for_a_run(how: dict[str, Any]) -> None:
    """Without a graph break and without a recompilation, and the numbers are the same."""
    from torch._dynamo.utils import counters

    pipe = pairs.refiner()
    arguments = {"image": torch.zeros(1, 3, 64, 64), "num_inference_steps": 8, "strength": 0.5}
    arguments |= {"output_type": "latent"}
    plain = pipe("a cup", generator=seeded(0), **arguments).images
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **how)
    compiled = pipe("a cup", generator=seeded(0), **arguments).images
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert float((compiled - plain).norm() / plain.norm()) <= COMPILED
