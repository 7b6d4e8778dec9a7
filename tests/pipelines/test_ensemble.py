"""The ensemble of experts: one run of two networks, its hand-off, its plan, its errors."""

from typing import Any

import checks
import pairs
import peers
import pytest
import torch
from cases import sample
from pairs import SMALL, seeds
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.pipelines import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline
from sdxl_ref.pipelines.ensemble import EnsembleRequest

MEMORYLESS = ("euler", "ddim", "euler_ancestral", "ddpm")  # one evaluation a step, and no history


class Same(nn.Module):
    """One network for both sides: a refiner's UNet that reads x and t, and a fixed conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = peers.small_unet(pairs.REFINER.unet, seed=3)
        self.context = checks.normal(1, 77, 64, seed=1).float()
        self.y = checks.normal(1, 1328, seed=2).float()

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, self.context.expand(len(x), -1, -1), self.y.expand(len(x), -1))


@pytest.mark.parametrize("karras", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("sampler", sample(SAMPLERS, "euler", "heun", "dpmpp_2m", "dpmpp_2s_ancestral"))
def test_one_network_on_both_sides_is_the_single_run(sampler: str, karras: bool) -> None:
    """Bit for bit, in a batch; and in the model card's two calls for solvers of one evaluation without history."""
    base = pairs.base()
    refiner = pairs.refiner()
    base.unet = refiner.unet = Same()
    arguments = SMALL | {"sampler": sampler, "karras": karras, "num_images_per_prompt": 2}
    whole = base("a cup", generator=seeds(1, 2), **arguments).images
    assert torch.equal(whole, EnsemblePipeline(base, refiner)("a cup", generator=seeds(1, 2), **arguments).images)
    if sampler in MEMORYLESS:
        draws = seeds(1, 2)
        part = base("a cup", generator=draws, denoising_end=0.8, **arguments).images
        finish = {"num_inference_steps": 10, "denoising_start": 0.8, "sampler": sampler, "karras": karras}
        finish |= {"image": part, "output_type": "latent", "generator": draws}
        assert torch.equal(whole, refiner(["a cup", "a cup"], **finish).images)


def test_two_networks_differ_from_one() -> None:
    ensemble = pairs.ensemble()
    alone = ensemble.base("a cup", generator=seeds(1), **SMALL).images
    assert not torch.equal(alone, ensemble("a cup", generator=seeds(1), **SMALL).images)
    everything = ensemble("a cup", generator=seeds(1), switch=1.0, **SMALL).images
    assert torch.equal(alone, everything)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2s_ancestral"])
def test_image_i_of_a_batch_is_the_image_made_alone(sampler: str) -> None:
    """Within 1e-4 of the pictures' range, 0 to 1: a batch sums in another order."""
    ensemble = pairs.ensemble()
    prompts = ["a", "b cup", "c on a table", "d"]
    options = SMALL | {"sampler": sampler, "output_type": "pt"}
    batch = ensemble(prompts, generator=seeds(5, 6, 7, 8), **options).images
    for i, prompt in enumerate(prompts):
        alone = ensemble(prompt, generator=seeds(5 + i), **options).images
        assert (batch[i] - alone[0]).abs().max() <= 1e-4


def test_the_plan_tells_who_evaluates_what() -> None:
    plan = EnsemblePipeline.plan_for(EnsembleRequest(prompt="", num_inference_steps=50, sampler="heun"))
    assert plan.evaluations == (79, 20)  # 40 steps start in the base; the second half of the last one is below
    assert str(plan) == "base 79 evaluations, sigma 13.12 → 0.527; refiner 20, 0.527 → 0"


def test_a_run_that_starts_far_below_pure_noise_warns() -> None:
    """Before the first step."""
    request = EnsembleRequest(prompt="", height=8, width=8, num_inference_steps=2, switch_step=1)
    with pytest.warns(UserWarning, match="starts at t = 501, far below"):
        next(pairs.ensemble().steps(request))


def test_scores_are_the_refiners_and_second_prompts_the_bases() -> None:
    ensemble = pairs.ensemble()
    plain = ensemble("a cup", generator=seeds(1), **SMALL).images
    for changes in ({"aesthetic_score": 1.0}, {"prompt_2": "a dog"}, {"target_size": (8, 8)}):
        assert not torch.equal(plain, ensemble("a cup", generator=seeds(1), **SMALL, **changes).images)


def test_parts_are_the_bases_and_can_be_replaced() -> None:
    ensemble = pairs.ensemble()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(ensemble, part) is getattr(ensemble.base, part)
        replaced = nn.Identity()
        setattr(ensemble, part, replaced)
        assert getattr(ensemble.base, part) is replaced


def test_to_moves_both() -> None:
    base = TextToImagePipeline(pairs.BASE, **pairs.own_networks("base"))
    ensemble = EnsemblePipeline(base, pairs.refiner())
    ensemble.refiner.unet = peers.small_unet(pairs.REFINER.unet)
    ensemble.refiner.text_encoder_2 = base.text_encoder_2
    assert ensemble.to(torch.bfloat16) is ensemble
    assert ensemble.base.dtype == ensemble.refiner.dtype == torch.bfloat16
    assert next(ensemble.vae.parameters()).dtype == torch.float32


def test_an_open_pipeline_is_taken_as_it_is(tiny_refiner_file: Any) -> None:
    base = pairs.base()
    ensemble = EnsemblePipeline.from_pretrained(base, tiny_refiner_file)
    assert ensemble.base is base
    assert ensemble.refiner.vae is base.vae


def test_parts_that_one_of_the_models_has_no_use_for(tiny_base_file: Any, tiny_refiner_file: Any) -> None:
    base = pairs.base()
    with pytest.raises(InputError, match="an SDXL refiner has no text_encoder: leave it out"):
        ImageToImagePipeline.from_pretrained(tiny_refiner_file, text_encoder=base.text_encoder)
    with pytest.raises(InputError, match="the two models have a UNet each"):
        EnsemblePipeline.from_pretrained(tiny_base_file, tiny_refiner_file, unet=base.unet)
    with pytest.raises(InputError, match="low_memory is for models that are opened here"):
        EnsemblePipeline.from_pretrained(base, tiny_refiner_file, low_memory=True)


def test_the_wrong_kind_of_model(tiny_base_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pairs.base()
    with pytest.raises(InputError, match="expected a refiner"):
        EnsemblePipeline(base, base)  # type: ignore[arg-type]
    monkeypatch.setattr(TextToImagePipeline, "from_pretrained", lambda *_, **__: pytest.fail("the base was read"))
    with pytest.raises(InputError, match="expected a refiner"):
        EnsemblePipeline.from_pretrained(tiny_base_file, tiny_base_file)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"switch": 0.0}, "above 0 and at most 1, found 0.0"),
        ({"switch": 1.2}, "above 0 and at most 1, found 1.2"),
        ({"switch": 0.9999}, "the refiner would run 0 steps"),
        ({"switch": 0.001}, "the base would run 0 steps"),
        ({"switch_sigma": 0.001}, "the refiner would run 0 steps"),
        ({"switch_sigma": 50.0}, "the base would run 0 steps"),
        ({"switch_step": 50}, "one expert would run 0 steps: expected from 1 to 49"),
        ({"switch_step": 0}, "one expert would run 0 steps: expected from 1 to 49"),
        ({"switch": 0.8, "switch_step": 3}, "give one of them"),
        ({"switch_step": 3, "s_churn": 3.0}, "s_churn moves the levels that switch_step counts"),
    ],
    ids=str,
)
def test_bad_switches(switch: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnsemblePipeline.plan_for(EnsembleRequest(prompt="", **switch))


def test_a_second_negative_prompt_is_the_bases_alone() -> None:
    pipe = pairs.ensemble()
    request = pipe.request(prompt="a cup", negative_prompt_2="grey")
    assert pipe.unconditional(request) == "base negative prompt encoded; refiner empty prompt encoded"
