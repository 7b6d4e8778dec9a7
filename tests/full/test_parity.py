"""The parity lab at full size: every component against diffusers within 12 GB, and a kit of sketches."""

import json
import sys
from pathlib import Path

import full_file
import measure
import pytest
import torch
from pairs import seeded
from torch import Tensor

from sdxl_ref.parity.network_runs import recorded
from sdxl_ref.parity.report import RESULT
from sdxl_ref.parity.sketch import Sketch, distance, sketch
from sdxl_ref.parity.trace import Trace
from sdxl_ref.text.tokenizer import tokenize
from sdxl_ref.weights.opening import open_checkpoint

pytestmark = pytest.mark.full

SDXL_REF = str(Path(sys.executable).with_name("sdxl-ref"))
MEMORY = 12e9  # bytes of anonymous memory: mapped files come and go
BETWEEN_REFERENCES = {"unet": 1.7e-6, "text": 7.7e-7, "vae": 7.3e-7}  # relative, float32: what two of them are apart


@pytest.mark.parametrize("part", BETWEEN_REFERENCES)
def test_a_component_against_diffusers(part: str, tmp_path: Path) -> None:
    command = [SDXL_REF, "parity", "run", "--checkpoint", str(full_file.full_file()), "--against", "diffusers"]
    command += ["--part", part, "--side", "128", "--json", str(tmp_path / "report.json")]
    measured = measure.measure(command, HF_HUB_OFFLINE="1")
    report = json.loads((tmp_path / "report.json").read_text())
    name = {"unet": "unet", "text": "text_encoder_2/ln_final", "vae": "vae/decoded"}[part]
    output = next(point for point in report["points"] if point["name"] == name)
    print(f"\n{part}: {len(report['points'])} points, {name} {output['relative_l2']:.1e} from float64's,")
    print(f"{measured.seconds:.0f} s, {measured.peak_anonymous / 1e9:.2f} GB of anonymous memory")
    assert report["verdict"] == "agrees"
    assert output["relative_l2"] <= BETWEEN_REFERENCES[part]
    assert measured.peak_anonymous <= MEMORY


def test_a_kit_of_sketches(tmp_path: Path) -> None:
    command = [SDXL_REF, "parity", "kit", "--checkpoint", str(full_file.full_file()), "--out", str(tmp_path / "kit")]
    measured = measure.measure([*command, "--sketch", "--side", "128"])
    size = sum(file.stat().st_size for file in (tmp_path / "kit").iterdir())
    trace = Trace.load(tmp_path / "kit" / "kit.safetensors")
    print(f"\n{len(trace.points())} points, {size / 1e6:.1f} MB, {measured.seconds:.0f} s,", end=" ")
    print(f"{measured.peak_anonymous / 1e9:.2f} GB of anonymous memory")
    assert all(isinstance(trace.get(key), Sketch) for key in trace.outputs() if key != RESULT)
    assert size <= 50e6
    assert measured.peak_anonymous <= MEMORY


def inputs(part: str) -> tuple[Tensor, ...]:
    """Of a network of the refiner's: latents of 16x20, pictures of 128x160."""
    if part == "text_encoder_2":
        return (tokenize(["blurry", "a cup of coffee on a wooden table"], pad="zero"),)
    if part == "vae":
        return torch.rand(1, 3, 128, 160, generator=seeded(0)) * 2 - 1, torch.randn(1, 4, 16, 20, generator=seeded(1))
    x, context, y = (torch.randn(2, *size, generator=seeded(2)) for size in ((4, 16, 20), (77, 1280), (2560,)))
    return x, torch.tensor([199.0, 199.0]), context, y


@torch.no_grad()
def test_sketches_tell_distances_within_a_tenth() -> None:
    """At every point of each network: how far a run in bfloat16 is off, from two sketches and from the tensors."""
    ratios = []
    for part in ("text_encoder_2", "vae", "unet"):
        network = open_checkpoint(full_file.full_file()).load(part)
        whole = recorded(network, part, inputs(part), None)
        rough = recorded(network.to(torch.bfloat16), part, inputs(part), torch.bfloat16)
        for key in whole.outputs():
            a, b = whole.tensor(key), rough.tensor(key)
            assert a is not None
            assert b is not None
            gap = float((a - b.float()).double().norm())
            if gap:
                ratios.append(distance(sketch(a), sketch(b)) / gap)
    farthest = max(abs(ratio - 1) for ratio in ratios)
    print(f"\n{len(ratios)} points, farthest {farthest:.1%}, deviation {torch.tensor(ratios).std():.1%}")
    assert len(ratios) > 1800
    assert farthest < 0.1
