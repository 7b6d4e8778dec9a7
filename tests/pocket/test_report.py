"""The report on the figures that are kept stands in the pocket pair's README."""

import json
from pathlib import Path

from sdxl_ref.pocket import report as report_module
from sdxl_ref.pocket.evaluate import Share
from sdxl_ref.pocket.report import report


def test_the_readme_has_the_figures_that_are_kept() -> None:
    """Every line of the report on the kept figures stands in the pocket pair's README."""
    folder = Path(report_module.__file__).parent
    figures = json.loads((folder / "evaluation.json").read_text())
    for way in ("base alone", "ensemble", "two stages", "drawn"):
        groups = figures[way]["scores"]
        for group, shares in groups.items():
            groups[group] = {name: Share(**share) for name, share in shares.items()}
    lines = report(figures).splitlines()
    assert len(lines) > 20
    text = (folder / "README.md").read_text().splitlines()
    assert [line for line in lines if line not in text] == []
