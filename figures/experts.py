"""Draw the figure of the two experts in README.md: one run of the solver, and who evaluates at which noise level.

    make figures        (needs the extra `notebooks`)

The run is the pocket pair's; the errors are those that `sdxl-ref evaluate` measured (sdxl_ref/pocket/evaluation.json).
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdxl_ref import EnsemblePipeline
from sdxl_ref.pictures.images import from_tensor
from sdxl_ref.pipelines.ensemble import EnsembleRequest

TARGET = Path(__file__).with_name("experts.png")
PROMPT = "a red square above a blue circle on a white plain background"
COLOURS = {"base": "#3b6fb6", "refiner": "#d1642b"}
STEPS = 20
SHOWN = (0, 3, 6, 9, 11, 13, 15, 17, 19)  # steps whose estimate is shown


def main() -> None:
    pipe = EnsemblePipeline.from_pretrained("pocket", "pocket")
    generator = torch.Generator().manual_seed(1)
    request = EnsembleRequest(
        prompt=PROMPT, num_inference_steps=STEPS, karras=True, guidance_scale=3.0, generator=generator
    )
    plan = pipe.plan(request)
    estimates = [pipe.decode(step.denoised) for step in pipe.steps(request)]
    owners = ["base" if sigma >= plan.switch else "refiner" for sigma in plan.grid.sigmas[:-1].tolist()]

    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2.2))
    for axes, i in zip(above.subplots(1, len(SHOWN)), SHOWN, strict=True):
        draw_estimate(axes, estimates[i], owners[i], i)
    left, right = below.subplots(1, 2)
    draw_levels(left, plan, owners)
    draw_errors(right)
    figure.savefig(TARGET, pil_kwargs={"optimize": True})
    print(f"wrote {TARGET.name}: {plan}")


def draw_estimate(axes: Axes, image: torch.Tensor, owner: str, step: int) -> None:
    """The estimate of the clean picture after a step, framed in the colour of the network that made it."""
    [picture] = from_tensor(image)
    axes.imshow(np.asarray(picture))
    axes.set_title(f"step {step + 1}", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=COLOURS[owner], linewidth=3)


def draw_levels(axes: Axes, plan: Any, owners: list[str]) -> None:
    """The noise level of each step, in the colour of its owner."""
    sigmas = plan.grid.sigmas[:-1].tolist()
    for owner in COLOURS:
        steps = [i + 1 for i, name in enumerate(owners) if name == owner]
        axes.plot(
            steps, [sigmas[i - 1] for i in steps], "o-", color=COLOURS[owner], label=f"{owner}: {len(steps)} steps"
        )
    axes.axhline(plan.switch, color="grey", linestyle="--", linewidth=1)
    axes.annotate(f"hand-off at sigma {plan.switch:.3g}", (1, plan.switch), fontsize=9, va="bottom", color="grey")
    axes.set_xticks(range(2, len(owners) + 1, 2))
    axes.set_yscale("log")
    axes.set_xlabel("step of one run of the solver (Karras' sigmas)")
    axes.set_ylabel("noise level sigma")
    axes.legend()


def draw_errors(axes: Axes) -> None:
    """The error of the predicted noise by training step, as it was measured."""
    figures = json.loads((files("sdxl_ref") / "pocket" / "evaluation.json").read_text())
    for owner, colour in COLOURS.items():
        levels = [level for level in figures["levels"] if owner == "base" or level < 200]
        axes.plot(levels, figures["errors"][owner][: len(levels)], marker=".", color=colour, label=owner)
    axes.axvspan(0, 200, color=COLOURS["refiner"], alpha=0.1, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("training step t (the refiner learnt t < 200 alone)")
    axes.set_ylabel("mean squared error of the noise")
    axes.legend()


if __name__ == "__main__":
    main()
