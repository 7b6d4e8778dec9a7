"""The figures of `sdxl-ref evaluate` as Markdown and as a chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_ref.pocket.evaluate import GROUPS, Share
from sdxl_ref.pocket.painters import WAYS

COLUMNS = (*WAYS, "drawn")  # of the tables
BAR = 0.25  # width, in groups
BAR_STEP = 0.27  # from one bar of a group to the next
REFINER_LIMIT = 200  # the refiner is trained below this training step
Figures = Mapping[str, Any]  # as they are in evaluation.json


def report(figures: Figures) -> str:
    """Markdown: every figure with its count and interval."""
    share, low, high = figures["gain"]
    lines = [
        f"- Autoencoder: {figures['vae_psnr']:.1f} dB on {figures['prompts']} scenes that it was not trained on.",
        f"- Refiner's denoising error for t < 200: {share:.1%} under the base's ({low:.1%} to {high:.1%}).",
        f"- Painted with {figures['steps']} network evaluations, guidance {figures['guidance_scale']}.",
        "",
        *group_table(figures),
        "",
        *attribute_table(figures),
        "",
        *distance_table(figures),
        "",
    ]
    differences = [
        f"{side} px {mean:.1f} ({low:.1f} to {high:.1f})" for side, (mean, low, high) in figures["nearer"].items()
    ]
    lines.append(f"By so much is the ensemble's less than the base's: {', '.join(differences)}.")
    return "\n".join([*lines, ""])


def table(title: str, rows: Mapping[str, Sequence[object]]) -> list[str]:
    """Lines of a Markdown table, with a column for each of COLUMNS."""
    lines = [row_of(title, COLUMNS), "| --- |" + " --- |" * len(COLUMNS)]
    return lines + [row_of(name, cells) for name, cells in rows.items()]


def row_of(name: str, cells: Sequence[object]) -> str:
    return f"| {name} | {' | '.join(str(cell) for cell in cells)} |"


def group_table(figures: Figures) -> list[str]:
    """The pictures of each group that are all right."""
    rows = {}
    for group in figures["drawn"]["scores"]:
        rows[group] = [figures[column]["scores"][group]["all_right"] for column in COLUMNS]
    return table("all right", rows)


def attribute_table(figures: Figures) -> list[str]:
    """The pictures of all groups that show an attribute; a relation is counted where there are two things."""
    rows = {}
    for attribute in next(iter(figures["drawn"]["scores"].values())):
        counted = [group for group, (things, _) in GROUPS.items() if attribute != "relation" or things == 2]
        name = attribute.replace("_", " ")
        rows[name] = [
            together([figures[column]["scores"][group][attribute] for group in counted]) for column in COLUMNS
        ]
    return table("attribute, all groups", rows)


def distance_table(figures: Figures) -> list[str]:
    """The patch distances at each scale, and their mean."""
    distances = [figures[column]["distances"] for column in COLUMNS]
    rows = {f"{side} px": [f"{own[side]:.1f}" for own in distances] for side in distances[0]}
    rows["mean"] = [f"{sum(own.values()) / len(own):.1f}" for own in distances]
    return table("patch distance to drawn scenes", rows)


def together(shares: Sequence[Share]) -> Share:
    """The share in several groups together."""
    return Share(sum(share.right for share in shares), sum(share.of for share in shares))


def write_chart(figures: Figures, path: Path) -> None:
    """Scores by way of painting, beside the denoising errors by level, as a PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_scores(left, figures)
    plot_errors(right, figures)
    figure.savefig(path, format="png", dpi=120)


def plot_scores(axes: Any, figures: Figures) -> None:
    """A bar for each group and way of painting, with its interval."""
    groups = list(figures["drawn"]["scores"])
    for i, way in enumerate(WAYS):
        heights = []
        below = []
        above = []
        for group in groups:
            share = figures[way]["scores"][group]["all_right"]
            low, high = share.interval
            height = 100 * (share.right / share.of)
            heights.append(height)
            below.append(height - 100 * low)
            above.append(100 * high - height)
        positions = [position + BAR_STEP * (i - 1) for position in range(len(groups))]
        axes.bar(positions, heights, BAR, yerr=[below, above], capsize=2, label=way)
    axes.set_xticks(range(len(groups)), [group.replace(", ", ",\n") for group in groups])
    axes.set_ylabel("prompts painted all right, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="lower left")


def plot_errors(axes: Any, figures: Figures) -> None:
    """The errors of base and refiner by level; the refiner's as far as it is trained."""
    levels = figures["levels"]
    shown = {"base": len(levels), "refiner": len([level for level in levels if level < REFINER_LIMIT])}
    for name, count in shown.items():
        axes.plot(levels[:count], figures["errors"][name][:count], marker=".", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("training step t")
    axes.set_ylabel("mean squared error of the noise")
    axes.legend()
