"""Every model on a picture, or from noise: the ensemble as well, with the hand-off inside the run."""

from typing import Any

import pairs
import pytest
import torch

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline
from sdxl_ref.config import InputError


def test_a_base_starts_from_noise_in_the_pipeline_of_pictures_too() -> None:
    call = {"prompt": "a cup", **pairs.SMALL}
    one = ImageToImagePipeline(pairs.BASE, **pairs.shared("base"))(**call, generator=pairs.seeded(1)).images
    assert one.equal(pairs.base()(**call, generator=pairs.seeded(1)).images)


def ensemble_on_a_picture(pipe: EnsemblePipeline, **arguments: Any) -> torch.Tensor:
    call = pairs.request(**{"strength": 0.6, "generator": pairs.seeds(7)} | arguments)
    images: torch.Tensor = pipe(**call).images
    return images


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "lms"])
def test_with_one_model_on_both_sides_the_ensemble_is_its_single_run(sampler: str) -> None:
    """Bit for bit: the hand-off leaves the solver alone."""
    pipe = pairs.ensemble()
    networks = pairs.base()
    pipe.refiner.unet = UnetOfTheOther(networks, pipe)
    single = pairs.base()(**pairs.request(strength=0.6, sampler=sampler, generator=pairs.seeds(7))).images
    assert ensemble_on_a_picture(pipe, sampler=sampler, switch=0.7).equal(single)


class UnetOfTheOther(torch.nn.Module):
    """The base's UNet in the refiner's place, on the conditioning that the base had."""

    def __init__(self, base: Any, pipe: EnsemblePipeline) -> None:
        super().__init__()
        self.unet = base.unet
        self.seen: list[Any] = []
        pipe.base.unet = torch.nn.Module()
        pipe.base.unet.register_parameter("weight", next(base.unet.parameters()))
        pipe.base.unet.forward = self.of_base  # type: ignore[method-assign]

    def of_base(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen = [context, y]
        return self.unet(x, t, context, y)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor, t: torch.Tensor, _context: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, *self.seen)  # type: ignore[no-any-return]


def test_both_experts_work_on_a_picture() -> None:
    """The run starts at the level of the strength, and the plan says who evaluates what."""
    pipe = pairs.ensemble()
    request = pipe.request(**pairs.request(strength=0.6, switch=0.7))
    plan = pipe.plan(request)
    assert plan.evaluations == (3, 3)
    assert len(plan.grid.timesteps) == 6
    calls: list[str] = []
    hooks = [
        model.unet.register_forward_hook(lambda *_, kind=model.config.kind: calls.append(kind))
        for model in pipe.models()
    ]
    ensemble_on_a_picture(pipe, switch=0.7)
    for hook in hooks:
        hook.remove()
    assert calls == ["base"] * 3 + ["refiner"] * 3


def test_an_expert_without_a_step_is_told() -> None:
    with pytest.raises(InputError, match="the base would run 0 steps"):
        ensemble_on_a_picture(pairs.ensemble(), strength=0.1, switch=0.7)


def test_the_picture_is_encoded_by_the_bases_vae() -> None:
    pipe = pairs.ensemble()
    image = torch.rand(1, 3, 64, 64, generator=pairs.seeded(0))
    latents = torch.randn(1, 4, 8, 8, generator=pairs.seeded(1))
    assert ensemble_on_a_picture(pipe, image=image).shape == (1, 4, 8, 8)
    again = ensemble_on_a_picture(pipe, image=latents)
    assert again.equal(ensemble_on_a_picture(pipe, image=latents))
