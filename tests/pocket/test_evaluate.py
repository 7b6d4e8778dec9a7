"""The figures of `sdxl-ref evaluate`: each measure on cases whose answer is known, and the command as a whole."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ref.checkpoint import build, prefixes
from sdxl_ref.cli import main
from sdxl_ref.commands.evaluate import report
from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.pocket import evaluate
from sdxl_ref.pocket.distance import patch_distances, pyramid
from sdxl_ref.pocket.evaluate import GROUPS, Painters, Share, gain, nearer, prompts, redrawn, scores, vae_quality
from sdxl_ref.pocket.models import CONFIGS
from sdxl_ref.saving import save_checkpoint


def test_prompts_are_the_same_each_time_and_of_their_groups() -> None:
    chosen, again = prompts(40), prompts(40)
    assert chosen.all == again.all
    assert torch.equal(chosen.drawn, again.drawn)
    for group, (things, held_out) in GROUPS.items():
        assert len(chosen.scenes[group]) == 10
        assert all(len(s.things) == things and s.held_out == held_out for s in chosen.scenes[group])
    for count in (510, 4, 0):
        with pytest.raises(InputError, match=r"multiple of 4, .* at least 8, found"):
            prompts(count)


def test_scores_of_drawn_scenes_are_full_and_of_shuffled_ones_are_not() -> None:
    chosen = prompts(80)
    for group in scores(chosen.drawn, chosen).values():
        assert group["all_right"].right >= 19
    shuffled = scores(chosen.drawn.roll(1, 0), chosen)
    assert sum(group["all_right"].right for group in shuffled.values()) <= 2


def test_wilsons_interval() -> None:
    low, high = Share(8, 10).interval
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Brown, Cai & DasGupta 2001
    assert Share(0, 50).interval[0] == pytest.approx(0, abs=1e-12)
    every = [
        (share.interval, share.right / share.of)
        for n in range(1, 140)
        for share in map(Share, range(n + 1), [n] * (n + 1))
    ]
    assert all(low <= middle <= high for (low, high), middle in every)  # rounding included: the chart's bars need it
    assert str(Share(1, 2)).startswith("50.0% (1/2; ")


def test_patch_distances_know_where_two_sets_differ() -> None:
    """Little for scenes that are drawn again; more for blur, and at the finest scale most; more for another tone."""
    chosen = prompts(64)
    drawn = chosen.drawn
    assert set(patch_distances(drawn, drawn)) == {128, 64, 32}
    again = patch_distances(redrawn(chosen), drawn)
    kernel = torch.ones(3, 1, 5, 5) / 25
    blurred = torch.nn.functional.conv2d(torch.nn.functional.pad(drawn, (2,) * 4, mode="reflect"), kernel, groups=3)
    far = patch_distances(blurred, drawn)
    assert far[128] > 3 * again[128]
    assert far[128] > far[32]
    brighter = patch_distances((drawn + 0.2).clamp(0, 1), drawn)
    assert brighter[32] > 2 * again[32]


def test_a_pyramid_adds_up_and_tells_nothing_of_an_even_slope() -> None:
    """Burt & Adelson: what a level's half tells of it lies where it was taken, so that a slope leaves nothing."""
    slope = (torch.arange(64.0) / 64).expand(1, 3, 64, 64)
    fine, middle, rest = pyramid(slope, 3)
    assert fine[:, :, 8:-8, 8:-8].abs().max() < 1e-6
    assert middle[:, :, 8:-8, 8:-8].abs().max() < 1e-6
    assert rest.shape[-1] == 16


def test_nearer_knows_chance_from_a_difference() -> None:
    chosen = prompts(64)
    kernel = torch.ones(3, 1, 5, 5) / 25
    padded, again = torch.nn.functional.pad(chosen.drawn, (2,) * 4, mode="reflect"), redrawn(chosen)
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3)
    found = nearer(blurred, again, chosen)
    assert set(found) == {128, 64, 32}
    assert 0 < found[128][1] < found[128][0] < found[128][2]  # blur takes most from the finest scale
    assert nearer(again, blurred, chosen)[128][2] < 0
    assert all(low == mean == high == 0 for mean, low, high in nearer(again, again, chosen).values())
    other = nearer(redrawn(chosen), again.flip(3), chosen)
    assert all(low < 0 < high for _, low, high in other.values())  # a scene is as near in a mirror


def test_the_readme_has_the_figures_that_are_kept() -> None:
    """Every line of the report on the kept figures stands in the pocket pair's README."""
    folder = Path(evaluate.__file__).parent
    figures = json.loads((folder / "evaluation.json").read_text())
    for how in ("base alone", "ensemble", "two stages", "drawn"):
        found = figures[how]
        found["scores"] = {
            group: {name: Share(**share) for name, share in each.items()} for group, each in found["scores"].items()
        }
    lines = report(figures).splitlines()
    assert len(lines) > 20
    text = (folder / "README.md").read_text().splitlines()
    assert [line for line in lines if line not in text] == []


def test_vae_quality_is_the_peak_signal_to_noise_ratio() -> None:
    class Noisy(torch.nn.Module):
        def encode(self, images: torch.Tensor) -> "Noisy":
            self.images = images
            return self

        def mode(self) -> torch.Tensor:
            return self.images

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z + 0.02  # of a range of 2: 0.01 of the picture's

    grey = torch.full((3, 3, 16, 16), 0.5)
    assert vae_quality(Noisy(), grey) == pytest.approx(-20 * math.log10(0.01), abs=1e-3)  # type: ignore[arg-type]


def test_gain_of_a_fifth() -> None:
    base = torch.rand(7, 200, generator=torch.Generator().manual_seed(0)) + 1
    share, low, high = gain(base, 0.8 * base)
    assert share == pytest.approx(0.2, abs=1e-5)
    assert low == pytest.approx(high, abs=1e-4)  # every picture gains the same
    share, low, high = gain(base, base.flip(1))
    assert low < 0 < high


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("pocket"), {}
    torch.manual_seed(0)
    for kind, config in CONFIGS.items():
        found[kind] = folder / f"{kind}.safetensors"
        save_checkpoint(found[kind], config, {p: build(p, config) for p in prefixes(config)}, torch.float16)
    return found


def test_each_way_of_painting_takes_the_same_number_of_evaluations(untrained: dict[str, Path]) -> None:
    base = TextToImagePipeline.from_single_file(untrained["base"])
    refiner = ImageToImagePipeline.from_single_file(untrained["refiner"])
    calls: list[str] = []
    for name, pipe in (("base", base), ("refiner", refiner)):
        pipe.unet.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
    painters = Painters(base, refiner, steps=25, guidance=3.0)
    counts = {}
    for how in ("base alone", "ensemble", "two stages"):
        calls.clear()
        painted = painters.paint(how, ["a red circle on a white plain background"])
        assert painted.shape == (1, 3, 128, 128)
        counts[how] = calls.count("base"), calls.count("refiner")
    assert counts == {"base alone": (25, 0), "ensemble": (20, 5), "two stages": (19, 6)}


def test_the_command(
    untrained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evaluation"
    command = ["evaluate", "--base", str(untrained["base"]), "--refiner", str(untrained["refiner"]), "--out", str(out)]
    assert main([*command, "--prompts", "8", "--steps", "5"]) == 0
    text = capsys.readouterr().out
    assert "| all right | base alone | ensemble | two stages | drawn |" in text
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["base alone"]["scores"]["one thing"]["all_right"] == {"right": 0, "of": 2}
    assert figures["drawn"]["scores"]["two things, held out"]["all_right"]["of"] == 2
    assert len(figures["errors"]["base"]) == len(figures["levels"])
    with Image.open(out / "evaluation.png") as chart:
        assert np.asarray(chart.convert("L")).std() > 10
    assert text.count("(0/4; ") >= 3  # a relation is counted where there is one
    before = {path: path.read_bytes() for path in out.iterdir()}
    bad = {"--prompts 7": "multiple of 4", "--steps 2": "expected 3 to 1000 steps", "--guidance-scale nan": "finite"}
    for words, message in bad.items():
        assert main([*command, *words.split()]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "file")]) == 2
    assert "expected a folder, or the name of a new one" in capsys.readouterr().err

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([*command, "--prompts", "8", "--steps", "3"]) == 2
    told = capsys.readouterr()
    assert "could not write" in told.err
    assert "| all right | base alone" in told.out  # what was measured is not lost
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_base_of_another_size_is_refused_before_the_work(untrained: dict[str, Path], tmp_path: Path) -> None:
    config = replace(CONFIGS["base"], resolution=256)
    save_checkpoint(tmp_path / "base.safetensors", config, {p: build(p, config) for p in prefixes(config)}, torch.half)
    base = TextToImagePipeline.from_single_file(tmp_path / "base.safetensors")
    with pytest.raises(InputError, match="expected a base that paints scenes of 128 pixels, found 256"):
        Painters(base, ImageToImagePipeline.from_single_file(untrained["refiner"]), 25, 3.0)
