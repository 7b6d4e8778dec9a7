"""Every mistake of the lab's two tables, planted in ours: the lab names the module or step, and says which it was.

The peer is a copy of our own network, or our own run with one value exchanged; the kit is untouched.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pairs
import peers
import pytest
import torch
from cases import sample
from pairs import seeded
from torch import Tensor, nn

from sdxl_ref import parity
from sdxl_ref.networks import layers, unet, vae
from sdxl_ref.parity.diagnosis import planted
from sdxl_ref.parity.kit import Kit, make_kit, run
from sdxl_ref.parity.mistakes import MISTAKES, Mistake
from sdxl_ref.parity.pipelines import compare_with_kit
from sdxl_ref.parity.recording import Recorder
from sdxl_ref.parity.replay import SOURCES
from sdxl_ref.parity.steps_between import BETWEEN, Between, Known
from sdxl_ref.parity.trace import Key, matches
from sdxl_ref.text.tokenizer import tokenize

Case = tuple[Mistake, type[nn.Module]]
CASES: list[Case] = [(mistake, kind) for mistake in MISTAKES for kind in mistake.kinds]
USUAL = CASES[40]
SAME_THERE = {  # what is no mistake in this class: a VAE's attention has one head
    ("a single head", vae.AttnBlock),
    ("half as many heads", vae.AttnBlock),
    ("scores scaled by the root of the whole width", vae.AttnBlock),
    ("the exact gelu", nn.GELU),
    ("the exact gelu", unet.GEGLU),
    ("SiLU", nn.SiLU),
    ("quick gelu (x * sigmoid(1.702 x))", layers.QuickGELU),
}
NOWHERE = {("a norm with eps 1e-05", nn.LayerNorm)}  # the eps of all of them


@lru_cache
def network(part: str) -> Any:
    return {
        "unet": lambda: peers.small_unet(pairs.REFINER.unet),
        "vae": lambda: peers.small_vae(pairs.REFINER.vae),
        "text_encoder": lambda: peers.small_clip(peers.SMALL_BASE.text_encoders[0]),
        "text_encoder_2": lambda: peers.small_openclip(peers.SMALL_REFINER.text_encoders[0]),
    }[part]()


@lru_cache
def inputs(part: str) -> tuple[Tensor, ...]:
    """The timesteps are no whole numbers; the maps are no squares."""
    config = pairs.REFINER.unet
    if part == "unet":
        x, context = (
            torch.randn(*shape, generator=seeded(0)) for shape in ((2, 4, 12, 16), (2, 77, config.context_dim))
        )
        y = torch.randn(2, config.adm_in_channels, generator=seeded(1))
        return x, torch.tensor([199.25, 3.5]), context, y
    if part == "vae":
        images = torch.rand(1, 3, 64, 96, generator=seeded(0)) * 2 - 1
        return images, torch.randn(1, 4, 8, 12, generator=seeded(1))
    return (tokenize(["a cup of coffee on a wooden table", "a dog"], pad="zero"),)


def places(mistake: Mistake, kind: type[nn.Module]) -> Iterator[tuple[str, str]]:
    """Modules of a class where a mistake can be made."""
    for part in ("unet", "text_encoder_2", "text_encoder", "vae"):
        for name, module in network(part).named_modules():
            if isinstance(module, kind) and mistake.plant(module) is not None:
                yield part, name


@pytest.mark.parametrize("case", sample(CASES, USUAL), ids=lambda case: f"{case[1].__name__}: {case[0].text}")
def test_a_mistake_in_a_module_is_named(case: Case) -> None:
    mistake, kind = case
    part, name = next(places(mistake, kind), ("", ""))
    assert bool(part) is ((mistake.text, kind) not in NOWHERE)
    if not part:
        return
    candidate = copy.deepcopy(network(part))
    with planted(candidate.get_submodule(name), mistake) as is_planted:
        assert is_planted
        report = parity.compare(network(part), candidate, inputs(part))
    point = f"{part}/{name}" if name else part
    if (mistake.text, kind) in SAME_THERE:
        assert report.culprits == []
        return
    found = next(row for row in report.points if row.name == point)
    assert found.own is not None
    print(f"{point}: {mistake.text}: own error {found.own:.1e}, {found.own / found.budget:.1f} times the budget")
    assert report.culprits == [point]
    assert mistake.text in report.causes[point] or is_as_near(report.causes[point])


def is_as_near(cause: str) -> bool:
    """Another mistake with the same outcome here: what is left is rounding."""
    return float(cause.rpartition(" to ")[2]) < 1e-6


FOLDER = TemporaryDirectory(prefix="sdxl-ref-kit-")


def reference() -> Any:
    """Plain also with --packed: the lab runs it in float64."""
    return pairs.ImageToImagePipeline(pairs.REFINER, **pairs.networks("refiner"))


@lru_cache
def kit() -> Kit:
    return make_kit(reference(), Path(FOLDER.name), (torch.float32,), side=64, say=lambda text: None)


class Planter(Recorder):
    """Records a run of ours in which one point has a mistake."""

    def __init__(self, mistake: Between, pipe: Any, request: Any) -> None:
        super().__init__()
        self.mistake = mistake
        self.known = Known(pipe, request, self)  # type: ignore[arg-type]
        self.ours: dict[Key, Tensor] = {}
        self.is_planted = False

    @property
    def theirs(self) -> Any:
        return self.trace

    def handed(self, key: Key, value: Tensor) -> Tensor:
        point = SOURCES.get(str(key._replace(call=0)), "")
        return super().handed(key, self.exchanged(point, key.call, value))

    def returned(self, key: Key, value: Tensor) -> Tensor:
        self.ours[key] = value.clone()
        return super().returned(key, self.exchanged(key.point, key.call, value))

    def exchanged(self, point: str, call: int, value: Tensor) -> Tensor:
        if not matches(point, self.mistake.point):
            return value
        other = self.mistake.value(value, self.known, call)
        if other is None or torch.equal(other, value):
            return value
        self.is_planted = True
        return other.to(value)


def name_of(mistake: Between) -> str:
    return f"{mistake.point}: {mistake.text}"


@pytest.mark.parametrize("mistake", sample(BETWEEN, BETWEEN[0]), ids=name_of)
def test_a_mistake_between_the_networks_is_named(mistake: Between) -> None:
    pipe = reference()
    planter = Planter(mistake, pipe, kit().request(pipe).completed(pipe.defaults))
    run(pipe, kit(), planter)
    report = compare_with_kit(planter.trace, kit(), pipe)
    if not planter.is_planted:
        assert report.culprits == []
        return
    [culprit] = report.culprits
    assert matches(culprit, mistake.point)
    assert mistake.text in report.causes[culprit] or is_as_near(report.causes[culprit])
