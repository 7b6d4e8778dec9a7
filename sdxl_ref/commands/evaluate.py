"""`sdxl-ref evaluate`: what a base and a refiner trained on scenes can do, as tables and one chart."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sdxl_ref.commands.common import writable
from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.pocket.evaluate import (
    HOW,
    LEVELS,
    Painters,
    Share,
    denoising_errors,
    distances,
    gain,
    prompts,
    redrawn,
    scores,
    vae_quality,
)

UNDER_200 = tuple(range(0, 200, 10))  # steps that stand for 0..199


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base", default="pocket", metavar="MODEL", help="a base that paints scenes of 128 pixels")
    p.add_argument("--refiner", default="pocket", metavar="MODEL", help="the refiner that goes with it")
    p.add_argument("--prompts", type=int, default=512, help="a quarter each: one and two things, seen and held out")
    p.add_argument("--steps", type=int, default=25, help="network evaluations, for each way of painting")
    p.add_argument("--guidance-scale", type=float, default=3.0)
    p.add_argument("--out", type=Path, default=Path("evaluation"), metavar="FOLDER", help="must exist, or its parent")


def run(a: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the chart needs matplotlib: pip install 'sdxl-ref[notebooks]'") from error
    chosen = prompts(a.prompts)
    writable(a.out if not a.out.is_dir() else a.out / "evaluation.json")
    base = TextToImagePipeline.from_single_file(a.base)
    refiner = ImageToImagePipeline.from_single_file(a.refiner)
    began = time.perf_counter()
    figures: dict[str, Any] = {"prompts": a.prompts, "steps": a.steps, "guidance_scale": a.guidance_scale}
    figures["vae_psnr"] = vae_quality(base.vae, chosen.drawn)
    figures["levels"] = LEVELS
    every = denoising_errors(base, chosen, LEVELS), denoising_errors(refiner, chosen, LEVELS)
    figures["errors"] = {name: each.mean(dim=1).tolist() for name, each in zip(("base", "refiner"), every, strict=True)}
    under = denoising_errors(base, chosen, UNDER_200), denoising_errors(refiner, chosen, UNDER_200)
    figures["gain"] = gain(*under)
    painters = Painters(base, refiner, a.steps, a.guidance_scale)
    captions = [scene.caption for scene in chosen.all]
    for how in HOW:
        painted = painters.paint(how, captions)
        figures[how] = {"scores": scores(painted, chosen), "distances": distances(painted, chosen)}
    figures["drawn"] = {"scores": scores(chosen.drawn, chosen), "distances": distances(redrawn(chosen), chosen)}
    figures["seconds"] = time.perf_counter() - began
    a.out.mkdir(exist_ok=True)
    text = report(figures)
    (a.out / "evaluation.json").write_text(json.dumps(figures, default=vars, indent=1))
    (a.out / "evaluation.md").write_text(text)
    chart(figures, a.out / "evaluation.png")
    print(text)
    print(f"wrote evaluation.json, evaluation.md and evaluation.png in {a.out}")


def report(figures: dict[str, Any]) -> str:
    """Markdown: every figure with its count and interval."""
    share, low, high = figures["gain"]
    lines = [f"- Autoencoder: {figures['vae_psnr']:.1f} dB on {figures['prompts']} scenes that it was not trained on."]
    lines += [f"- Refiner's denoising error for t < 200: {share:.1%} under the base's ({low:.1%} to {high:.1%})."]
    lines += [f"- Painted with {figures['steps']} network evaluations, guidance {figures['guidance_scale']}.", ""]
    ways = (*HOW, "drawn")
    lines += ["| all right | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for group in figures["drawn"]["scores"]:
        lines.append(f"| {group} | " + " | ".join(str(figures[w]["scores"][group]["all_right"]) for w in ways) + " |")
    lines += ["", "| attribute, all groups | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for name in next(iter(figures["drawn"]["scores"].values())):
        cells = [together([group[name] for group in figures[w]["scores"].values()]) for w in ways]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| patch distance to drawn scenes | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for side in figures["drawn"]["distances"]:
        lines.append(f"| {side} px | " + " | ".join(f"{figures[w]['distances'][side]:.1f}" for w in ways) + " |")
    means = [sum(figures[w]["distances"].values()) / len(figures[w]["distances"]) for w in ways]
    return "\n".join([*lines, "| mean | " + " | ".join(f"{mean:.1f}" for mean in means) + " |", ""])


def together(shares: list[Share]) -> Share:
    return Share(sum(each.right for each in shares), sum(each.of for each in shares))


def chart(figures: dict[str, Any], path: Path) -> None:
    """Scores by way of painting, beside the denoising errors by level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    groups = list(figures["drawn"]["scores"])
    for i, how in enumerate(HOW):
        found = [figures[how]["scores"][group]["all_right"] for group in groups]
        at = [100 * (each.right / each.of) for each in found]
        ends = [[100 * each.interval[k] for each in found] for k in (0, 1)]
        bars = [[a - b for a, b in zip(at, ends[0], strict=True)], [b - a for a, b in zip(at, ends[1], strict=True)]]
        left.bar([g + 0.27 * (i - 1) for g in range(len(groups))], at, 0.25, yerr=bars, capsize=2, label=how)
    left.set_xticks(range(len(groups)), [group.replace(", ", ",\n") for group in groups])
    left.set_ylabel("prompts painted all right, %")
    left.set_ylim(0, 105)
    left.legend(loc="lower left")
    for name in ("base", "refiner"):
        upto = len(figures["levels"]) if name == "base" else sum(level < 200 for level in figures["levels"])
        right.plot(figures["levels"][:upto], figures["errors"][name][:upto], marker=".", label=name)
    right.set_yscale("log")
    right.set_xlabel("training step t")
    right.set_ylabel("mean squared error of the noise")
    right.legend()
    figure.savefig(path, dpi=120)
