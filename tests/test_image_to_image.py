"""What image-to-image promises beyond parity: inputs, randomness, plans, results, errors."""

from typing import Any

import checks
import numpy as np
import peers
import pytest
import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.ecosystem import ImageToImagePipeline
from sdxl_ref.pipelines.image_to_image import ImageToImageRequest


@pytest.fixture
def pipe() -> ImageToImagePipeline:
    return ImageToImagePipeline(peers.SMALL_REFINER, **checks.small_pipeline_parts())  # type: ignore[arg-type]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def run(pipe: ImageToImagePipeline, **arguments: Any) -> Tensor:
    return pipe(**checks.request(**{"generator": seeds(0)} | arguments)).images  # type: ignore[no-any-return]


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_image_i_of_a_batch_is_the_image_made_alone(pipe: ImageToImagePipeline, sampler: str) -> None:
    images = torch.cat([checks.normal(1, 3, 64, 64, seed=i, dtype=torch.float32).clamp(-1, 1) for i in range(4)])
    prompts = ["a", "b cup", "c on a table", "d"]
    batch = run(pipe, image=images, prompt=prompts, generator=seeds(5, 6, 7, 8), sampler=sampler)
    for i in range(4):
        alone = run(pipe, image=images[i : i + 1], prompt=prompts[i], generator=seeds(5 + i), sampler=sampler)
        assert (batch[i] - alone[0]).abs().max() <= 1e-4


def test_same_seed_same_latents_and_no_global_state(pipe: ImageToImagePipeline) -> None:
    torch.manual_seed(1)
    first = run(pipe)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, run(pipe))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, run(pipe, generator=seeds(1)))
    assert not torch.equal(run(pipe, generator=None), run(pipe, generator=None))


def test_noise_is_added_at_exactly_the_first_level(pipe: ImageToImagePipeline) -> None:
    """The state before the first step is clean + sigmas[0] * noise, seen from what the network is given."""
    seen: list[tuple[Tensor, Tensor]] = []
    unet = pipe.unet

    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = unet

        def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
            seen.append((x, t))
            return self.inner(x, t, context, y)

    pipe.unet = Recorder()
    clean = checks.normal(1, 4, 8, 8, seed=1, dtype=torch.float32)
    for strength in (0.1, 0.5, 1.0):
        seen.clear()
        run(pipe, image=clean, strength=strength)
        sigma = pipe.plan(
            ImageToImageRequest(prompt="", image=clean, strength=strength, num_inference_steps=10)
        ).grid.sigmas[0]
        noise = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
        assert torch.equal(seen[0][0][:1], (clean + sigma * noise) / torch.sqrt(sigma**2 + 1))
        assert len(seen) == round(10 * strength)
        assert float(NoiseSchedule().sigmas[int(seen[0][1][0])]) == float(sigma)


def test_the_plan_is_known_before(pipe: ImageToImagePipeline) -> None:
    plan = pipe.plan(ImageToImageRequest(prompt="", image=checks.picture(), num_inference_steps=40))
    assert str(plan) == f"12 of 40 steps, sigma {NoiseSchedule().sigmas[11 * 25 + 1]:.4g} → 0"
    assert len(list(pipe.steps(ImageToImageRequest(**_no_output(checks.request(num_inference_steps=4)))))) == 2


def _no_output(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "output_type"}


def test_every_run_ends_at_zero(pipe: ImageToImagePipeline) -> None:
    for spacing in ("leading", "trailing", "linspace", "sgm"):
        for karras in (False, True):
            plan = pipe.plan(ImageToImageRequest(prompt="", image=checks.picture(), spacing=spacing, karras=karras))
            assert float(plan.grid.sigmas[-1]) == 0.0
            assert len(plan.grid.sigmas) == len(plan.grid.timesteps) + 1 == 16


def test_the_official_strength_rule(pipe: ImageToImagePipeline) -> None:
    request = ImageToImageRequest(
        prompt="", image=checks.picture(), strength=0.4, num_inference_steps=10, strength_rule="sgm"
    )
    assert len(pipe.plan(request).grid.timesteps) == 3


def test_two_calls_equal_one(pipe: ImageToImagePipeline) -> None:
    """denoising_end, then denoising_start on its latents, is the undivided run bit for bit."""
    noisy = 14 * checks.normal(1, 4, 8, 8, seed=3, dtype=torch.float32)
    whole = run(pipe, image=noisy, strength=None, denoising_start=0.0)
    first = run(pipe, image=noisy, strength=None, denoising_start=0.0, denoising_end=0.6)
    assert torch.equal(whole, run(pipe, image=first, strength=None, denoising_start=0.6))


def test_latents_stand_in_for_a_noised_image(pipe: ImageToImagePipeline) -> None:
    clean = checks.normal(1, 4, 8, 8, seed=1, dtype=torch.float32)
    sigma = pipe.plan(ImageToImageRequest(prompt="", strength=0.5, num_inference_steps=10)).grid.sigmas[0]
    noisy = clean + sigma * torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    assert torch.equal(run(pipe, image=clean), run(pipe, image=None, latents=noisy))


def test_a_callback_can_watch_and_steer(pipe: ImageToImagePipeline) -> None:
    seen = []

    def watch(pipeline: Any, i: int, sigma: float, tensors: dict[str, Tensor]) -> None:
        seen.append((i, sigma, tuple(tensors["latents"].shape)))

    def stop(pipeline: Any, i: int, sigma: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else tensors

    plain = run(pipe, callback_on_step_end=watch)
    assert [each[0] for each in seen] == [0, 1, 2, 3, 4]
    assert seen[-1][1:] == (0.0, (1, 4, 12, 16))
    assert not torch.equal(plain, run(pipe, callback_on_step_end=stop))


def test_output_types(pipe: ImageToImagePipeline) -> None:
    [pil] = pipe(**checks.request(output_type="pil", generator=seeds(0))).images
    array = run(pipe, output_type="np")
    tensor = run(pipe, output_type="pt")
    assert pil.size == (128, 96)
    assert array.shape == (1, 96, 128, 3)
    assert tensor.shape == (1, 3, 96, 128)
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    latents = run(pipe)
    assert torch.equal(pipe.decode(latents), tensor)


def test_a_replaced_unet_takes_effect(pipe: ImageToImagePipeline) -> None:
    before = run(pipe)
    pipe.unet = peers.small_unet(seed=9)
    assert not torch.equal(before, run(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_vae_in_float32(dtype: torch.dtype) -> None:
    parts = {"unet": peers.small_unet(), "vae": peers.small_vae(), "text_encoder_2": peers.small_openclip()}
    exact = ImageToImagePipeline(peers.SMALL_REFINER, **parts)  # type: ignore[arg-type]
    wanted = run(exact)
    low = exact.to(dtype)
    assert low.dtype == dtype
    assert next(low.vae.parameters()).dtype == torch.float32
    found = run(low)
    assert found.dtype == torch.float32
    assert 0 < peers.distance(found, wanted) < 0.2


def test_compiles_without_a_graph_break(pipe: ImageToImagePipeline) -> None:
    """The UNet is tensors in, tensor out: fullgraph, one graph for a whole run."""
    unet = peers.small_unet()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = run(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    assert torch.equal(plain, run(pipe))
    assert len(graphs) == 1
    assert unet.config == peers.SMALL_REFINER.unet


BAD = {
    "strength 0": ({"strength": 0.0}, "above 0 and at most 1, found 0.0"),
    "strength over 1": ({"strength": 1.01}, "above 0 and at most 1"),
    "no step left": ({"strength": 0.05}, "smallest strength is 0.1"),
    "0 steps": ({"num_inference_steps": 0}, "whole number from 1 to 1000, found 0"),
    "half a step": ({"num_inference_steps": 2.5}, "whole number from 1 to 1000, found 2.5"),
    "sampler": ({"sampler": "eular"}, "unknown sampler 'eular': expected one of euler"),
    "spacing": ({"spacing": "even"}, "unknown spacing 'even'"),
    "strength rule": ({"strength_rule": "?"}, "unknown strength rule"),
    "output type": ({"output_type": "png"}, "unknown output_type 'png'"),
    "two starts": ({"denoising_start": 0.8, "strength": 0.3}, "give one of them"),
    "start of a picture": ({"denoising_start": 0.8, "strength": None}, r"expected latents \(b,4,h,w\), since"),
    "no image": ({"image": None}, "give either image or latents"),
    "image and latents": ({"latents": torch.zeros(1, 4, 8, 8)}, "give either image or latents"),
    "channels": ({"image": torch.zeros(1, 5, 8, 8)}, r"found a tensor \(1, 5, 8, 8\)"),
    "no batch": ({"image": torch.zeros(3, 64, 64)}, r"found a tensor \(3, 64, 64\)"),
    "sides": ({"image": torch.zeros(1, 3, 60, 64)}, "multiples of 8"),
    "prompts and images": (
        {"prompt": ["a", "b", "c"], "image": torch.zeros(2, 3, 64, 64)},
        "one for each of 3 prompts",
    ),
    "negative prompts": (
        {"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"], "generator": seeds(0, 1, 2)},
        "found 2 for 3",
    ),
    "generators": ({"generator": seeds(0, 1)}, r"expected one generator per image \(1\), found 2"),
    "empty range": (
        {"image": torch.zeros(1, 4, 8, 8), "strength": None, "denoising_start": 0.9, "denoising_end": 0.5},
        "0 of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(pipe: ImageToImagePipeline, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def test_a_base_is_refused() -> None:
    with pytest.raises(InputError, match="expected a refiner"):
        ImageToImagePipeline(peers.SMALL_BASE, **checks.small_pipeline_parts())  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["prompt_2", "negative_prompt_2", "target_size", "negative_target_size"])
def test_arguments_the_refiner_cannot_use(pipe: ImageToImagePipeline, argument: str) -> None:
    with pytest.raises(InputError, match=f"{argument}.*refiner"):
        run(pipe, **{argument: (64, 64) if "size" in argument else "text"})


@pytest.mark.parametrize(
    ("part", "stage"),
    [("unet", "the UNet, on the step"), ("vae", "the VAE's encoder"), ("text_encoder_2", "the text encoder")],
)
def test_a_stage_that_turns_non_finite_is_named(part: str, stage: str) -> None:
    parts = {"unet": peers.small_unet(), "vae": peers.small_vae(), "text_encoder_2": peers.small_openclip()}
    next(iter(parts[part].parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match=f"{stage}.*not finite"):
        run(ImageToImagePipeline(peers.SMALL_REFINER, **parts))  # type: ignore[arg-type]
