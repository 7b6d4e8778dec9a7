"""Three ways of painting: the same number of evaluations, and models of scenes' size alone."""

from dataclasses import replace
from typing import Any

import peers
import pytest
from training_data import BASE, CONFIGS

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.pocket.painters import WAYS, Painters


def parts(config: ModelConfig) -> dict[str, Any]:
    return peers.networks(config)


def test_each_way_of_painting_takes_the_same_number_of_evaluations() -> None:
    base = TextToImagePipeline(BASE, **parts(BASE))
    refiner = ImageToImagePipeline(CONFIGS["refiner"], **parts(CONFIGS["refiner"]))
    calls: list[str] = []
    for name, pipe in (("base", base), ("refiner", refiner)):
        pipe.unet.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
    painters = Painters(base, refiner, steps=25, guidance=3.0)
    counts = {}
    for way in WAYS:
        calls.clear()
        painted = painters.paint(way, ["a red circle on a white plain background"])
        assert painted.shape == (1, 3, 128, 128)
        counts[way] = calls.count("base"), calls.count("refiner")
    assert counts == {"base alone": (25, 0), "ensemble": (20, 5), "two stages": (19, 6)}


def test_a_base_of_another_size_is_refused_before_the_work() -> None:
    large = replace(BASE, resolution=256)
    base = TextToImagePipeline(large, **parts(large))
    refiner = ImageToImagePipeline(CONFIGS["refiner"], **parts(CONFIGS["refiner"]))
    with pytest.raises(InputError, match="expected a base that paints scenes of 128 pixels, found 256"):
        Painters(base, refiner, 25, 3.0)
