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
from sdxl_ref.pocket.distance import patch_distances
from sdxl_ref.pocket.evaluate import (
    GROUPS,
    HOW,
    LEVELS,
    UNDER_200,
    Painters,
    Share,
    denoising_errors,
    gain,
    nearer,
    prompts,
    redrawn,
    scores,
    vae_quality,
)
from sdxl_ref.saving import replacing

FILES = ("evaluation.json", "evaluation.md", "evaluation.png")


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
    if a.out.exists() and not a.out.is_dir():
        raise InputError(f"expected a folder, or the name of a new one, as --out, found the file {a.out}")
    writable(*((a.out / name for name in FILES) if a.out.is_dir() else [a.out]))
    base = TextToImagePipeline.from_single_file(a.base)
    refiner = ImageToImagePipeline.from_single_file(a.refiner)
    painters = Painters(base, refiner, a.steps, a.guidance_scale)
    began = time.perf_counter()
    figures: dict[str, Any] = {"prompts": a.prompts, "steps": a.steps, "guidance_scale": a.guidance_scale}
    figures["vae_psnr"] = vae_quality(base.vae, chosen.drawn)
    figures["levels"] = LEVELS
    every = denoising_errors(base, chosen, LEVELS), denoising_errors(refiner, chosen, LEVELS)
    figures["errors"] = {name: each.mean(dim=1).tolist() for name, each in zip(("base", "refiner"), every, strict=True)}
    under = denoising_errors(base, chosen, UNDER_200), denoising_errors(refiner, chosen, UNDER_200)
    figures["gain"] = gain(*under)
    captions = [scene.caption for scene in chosen.all]
    painted = {how: painters.paint(how, captions) for how in HOW}
    for how, pictures in painted.items():
        figures[how] = {"scores": scores(pictures, chosen), "distances": patch_distances(pictures, chosen.drawn)}
    figures["nearer"] = nearer(painted["base alone"], painted["ensemble"], chosen)
    again = patch_distances(redrawn(chosen), chosen.drawn)
    figures["drawn"] = {"scores": scores(chosen.drawn, chosen), "distances": again}
    figures["seconds"] = time.perf_counter() - began
    print(text := report(figures), flush=True)
    a.out.mkdir(exist_ok=True)
    data, tables, picture = (a.out / name for name in FILES)
    with replacing(data) as beside:
        beside.write_text(json.dumps(figures, default=vars, indent=1))
    with replacing(tables) as beside:
        beside.write_text(text)
    with replacing(picture) as beside:
        chart(figures, beside)
    print(f"wrote {', '.join(FILES)} in {a.out}")


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
        counted = [group for group, (things, _) in GROUPS.items() if name != "relation" or things == 2]
        cells = [together([figures[w]["scores"][group][name] for group in counted]) for w in ways]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| patch distance to drawn scenes | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for side in figures["drawn"]["distances"]:
        lines.append(f"| {side} px | " + " | ".join(f"{figures[w]['distances'][side]:.1f}" for w in ways) + " |")
    means = [sum(figures[w]["distances"].values()) / len(figures[w]["distances"]) for w in ways]
    lines += ["| mean | " + " | ".join(f"{mean:.1f}" for mean in means) + " |", ""]
    less = [f"{side} px {m:.1f} ({low:.1f} to {high:.1f})" for side, (m, low, high) in figures["nearer"].items()]
    return "\n".join([*lines, f"By so much is the ensemble's less than the base's: {', '.join(less)}.", ""])


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
    figure.savefig(path, format="png", dpi=120)
