"""`sdxl-ref evaluate`: what a base and a refiner trained on scenes can do, as tables and one chart."""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from sdxl_ref.commands.common import check_writable
from sdxl_ref.config import InputError
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.pocket import evaluate
from sdxl_ref.pocket.distance import patch_distances
from sdxl_ref.pocket.painters import WAYS, Painters
from sdxl_ref.pocket.report import report, write_chart
from sdxl_ref.weights.file_saving import write_text
from sdxl_ref.weights.saving import replacing

DATA = "evaluation.json"
TABLES = "evaluation.md"
CHART = "evaluation.png"
FILES = (DATA, TABLES, CHART)


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base", default="pocket", metavar="MODEL", help="a base that paints scenes of 128 pixels")
    p.add_argument("--refiner", default="pocket", metavar="MODEL", help="the refiner that goes with it")
    p.add_argument("--prompts", type=int, default=512, help="a quarter each: one and two things, seen and held out")
    p.add_argument("--steps", type=int, default=25, help="network evaluations, for each way of painting")
    p.add_argument("--guidance-scale", type=float, default=3.0)
    p.add_argument("--out", type=Path, default=Path("evaluation"), metavar="FOLDER", help="must exist, or its parent")


def run(a: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the chart needs matplotlib: pip install 'sdxl-ref[notebooks]'")
    chosen = evaluate.prompts(a.prompts)
    if a.out.exists() and not a.out.is_dir():
        raise InputError(f"expected a folder, or the name of a new one, as --out, found the file {a.out}")
    outs = [a.out / name for name in FILES] if a.out.is_dir() else [a.out]
    check_writable(*outs, read=[a.base, a.refiner])
    base = TextToImagePipeline.from_pretrained(a.base)
    refiner = ImageToImagePipeline.from_pretrained(a.refiner)
    painters = Painters(base, refiner, a.steps, a.guidance_scale)
    figures = {"prompts": a.prompts, **measure(painters, chosen, a.steps, a.guidance_scale)}
    tables = report(figures)
    print(tables, flush=True)
    a.out.mkdir(exist_ok=True)
    write_text(a.out / DATA, json.dumps(figures, default=vars, indent=1))
    write_text(a.out / TABLES, tables)
    with replacing(a.out / CHART) as temporary:
        write_chart(figures, temporary)
    print(f"wrote {', '.join(FILES)} in {a.out}")


def measure(painters: Painters, chosen: evaluate.Prompts, steps: int, guidance_scale: float) -> dict[str, Any]:
    """All figures, by their names in evaluation.json."""
    start = time.perf_counter()
    pipes = {"base": painters.base, "refiner": painters.refiner}
    figures: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    figures["vae_psnr"] = evaluate.vae_quality(painters.base.vae, chosen.drawn)  # type: ignore[arg-type]
    figures["levels"] = evaluate.LEVELS
    figures["errors"] = {}
    errors_under_200 = {}
    for name, pipe in pipes.items():
        errors = evaluate.denoising_errors(pipe, chosen, evaluate.LEVELS)  # (levels,pictures)
        figures["errors"][name] = errors.mean(dim=1).tolist()
        errors_under_200[name] = evaluate.denoising_errors(pipe, chosen, evaluate.UNDER_200)
    figures["gain"] = evaluate.gain(errors_under_200["base"], errors_under_200["refiner"])
    captions = [scene.caption for scene in chosen.all]
    painted = {way: painters.paint(way, captions) for way in WAYS}
    for way in WAYS:
        distances = patch_distances(painted[way], chosen.drawn)
        figures[way] = {"scores": evaluate.scores(painted[way], chosen), "distances": distances}
    figures["nearer"] = evaluate.nearer(painted["base alone"], painted["ensemble"], chosen)
    distances = patch_distances(evaluate.redrawn(chosen), chosen.drawn)
    figures["drawn"] = {"scores": evaluate.scores(chosen.drawn, chosen), "distances": distances}
    figures["seconds"] = time.perf_counter() - start
    return figures
