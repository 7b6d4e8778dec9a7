"""The loss: against diffusers' UNet, scheduler and weights, for networks that predict noise and for those of v."""

from typing import Any

import diffusers
import peers
import pytest
import torch
from cases import diagonal
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from training_data import BASE

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.diffusion.denoiser import Prediction
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.text.conditioning import embed_numbers
from sdxl_ref.training.diffusion import (
    WEIGHTINGS,
    Batch,
    Corruption,
    Objective,
    encode_conditioning,
    epsilon_errors,
    squared_errors,
)
from sdxl_ref.weights import layouts

CONFIGS = {"base": peers.SMALL_BASE, "refiner": peers.SMALL_REFINER}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # our names and diffusers'
FLOAT32 = 1e-5  # relative: the same formula in another order, through a small network in float32
NOISED = 1e-5  # diffusers computes its levels in float32, ours come from float64
EMPTY = 1e-6  # a caption encoded alone, or beside others


def scheduler(prediction: str = "epsilon") -> Any:
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=PREDICTIONS[prediction]
    )


def parts(config: ModelConfig, seed: int = 0) -> nn.ModuleDict:
    names = ["unet", "text_encoder_2"] if config.kind == "refiner" else ["unet", "text_encoder", "text_encoder_2"]
    return nn.ModuleDict({name: peers.network(name, config, seed) for name in names})


@pytest.fixture(scope="module")
def towers() -> dict[str, nn.Module]:
    """The text encoders of a tiny base."""
    return {name: part for name, part in parts(BASE).items() if name != "unet"}


def batch(config: ModelConfig, captions: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(captions), 4, 8, 8, generator=generator)
    numbers = torch.tensor([[128, 96, 0, 8, 6.0]] if config.kind == "refiner" else [[128, 96, 0, 8, 64, 64.0]])
    return Batch(latents, captions, numbers.expand(len(captions), -1))


@pytest.mark.parametrize(("kind", "prediction"), diagonal([*CONFIGS], [*PREDICTIONS]))
def test_loss_and_gradients_of_a_step_equal_diffusers(kind: str, prediction: str) -> None:
    """The peer's scheduler adds the noise and makes the target; it embeds the numbers itself and takes its own mean."""
    config = CONFIGS[kind]
    networks = parts(config)
    data = batch(config, ["a cup", "two cups", "three"])
    timesteps = torch.tensor([3, 120, 199] if kind == "refiner" else [3, 500, 999])
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(2))
    kept = torch.zeros(3, dtype=torch.bool)
    conditioning = encode_conditioning(networks, data, kept)
    unet = networks["unet"].requires_grad_(True)
    objective = Objective(prediction=prediction)
    loss = objective.weighted_loss(unet, data.latents, Corruption(timesteps, noise, kept), conditioning)
    loss.backward()

    peer = peers.diffusers_unet(unet).requires_grad_(True)  # type: ignore[arg-type]
    for p in peer.parameters():  # the weights are shared: their gradients must not be
        p.grad = None
        p.data = p.data.clone()
    noisy = scheduler().add_noise(data.latents, noise, timesteps)
    target = noise if prediction == "epsilon" else scheduler().get_velocity(data.latents, noise, timesteps)
    added = {"text_embeds": conditioning.y[:, : config.text_encoders[-1].embed_dim], "time_ids": data.numbers}
    theirs = peer(noisy, timesteps, encoder_hidden_states=conditioning.context, added_cond_kwargs=added).sample
    expected = ((theirs - target) ** 2).mean()
    expected.backward()

    assert abs(float(loss.detach()) - float(expected.detach())) <= FLOAT32 * float(expected.detach())
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    rules = layouts.rules("unet", unet.state_dict(), unet.config)
    translated = layouts.to_other(rules, gradients)  # type: ignore[arg-type]
    peer_gradients = {name: p.grad for name, p in peer.named_parameters()}
    assert translated.keys() == peer_gradients.keys()
    ours = torch.cat([translated[name].flatten() for name in peer_gradients])
    others = torch.cat([gradient.flatten() for gradient in peer_gradients.values()])
    distance = peers.distance(ours, others)
    print(f"{kind}, {prediction}: loss {float(loss.detach()):.6f}, distance of all gradients {distance:.1e}")
    assert distance <= FLOAT32
    floor = 1e-6 * float(others.norm())  # a GroupNorm of one channel a group hides what is added before it
    for name, gradient in peer_gradients.items():
        assert float((translated[name] - gradient).norm()) <= FLOAT32 * float(gradient.norm()) + floor, name


class Recorder(nn.Module):
    """A UNet that records its inputs and returns zeros, or what it is built with."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output
        self.x = torch.empty(0)
        self.timesteps: list[int] = []
        self.dropped = 0  # captions of zeros

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        self.x = x
        self.timesteps += timesteps.tolist()
        self.dropped += int((context.abs().sum(dim=(1, 2)) == 0).sum())
        return torch.zeros_like(x) if self.output is None else self.output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noised_latents_and_targets_are_those_of_ddpm(prediction: str) -> None:
    """A network that returns the peer's target has no error; one that returns zeros has the target's square."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 10, 500, 999])
    conditioning = encode_conditioning(parts(BASE), batch(BASE, ["a cup"] * 4), torch.zeros(4, dtype=torch.bool))
    target = noise if prediction == "epsilon" else scheduler().get_velocity(latents, noise, timesteps)
    exact = Recorder(target)
    errors = squared_errors(exact, latents, timesteps, noise, conditioning, Prediction(prediction))
    assert torch.allclose(exact.x, scheduler().add_noise(latents, noise, timesteps), rtol=NOISED, atol=NOISED)
    assert torch.allclose(errors, torch.zeros(4), atol=NOISED**2)
    zero = squared_errors(Recorder(), latents, timesteps, noise, conditioning, Prediction(prediction))
    assert torch.allclose(zero, (target**2).mean(dim=(1, 2, 3)), rtol=FLOAT32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_epsilon_errors_are_those_of_the_noise_that_the_output_implies(prediction: str) -> None:
    """Whatever is predicted: from the peer's estimate of the clean latents."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, output = torch.randn(3, 4, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([1, 10, 500, 999])
    conditioning = encode_conditioning(parts(BASE), batch(BASE, ["a cup"] * 4), torch.zeros(4, dtype=torch.bool))
    errors = epsilon_errors(
        Recorder(output), latents, timesteps, noise, conditioning.context, conditioning.y, Prediction(prediction)
    )
    ddpm = scheduler(prediction)
    ddpm.config.clip_sample = False
    for i, t in enumerate(timesteps):
        noisy = ddpm.add_noise(latents[i], noise[i], t)
        abar = ddpm.alphas_cumprod[t]
        clean = ddpm.step(output[i], int(t), noisy).pred_original_sample
        implied = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
        expected = ((implied - noise[i]) ** 2).mean()
        assert float(errors[i]) == pytest.approx(float(expected), rel=1e-3)  # at t = 1 a small difference is divided


def test_dropped_captions_are_zeros_on_a_base_and_empty_on_a_refiner() -> None:
    for kind, config in CONFIGS.items():
        networks = parts(config)
        captions = ["a cup", "a cup", "two"]
        dropped = torch.tensor([False, True, False])
        conditioning = encode_conditioning(networks, batch(config, captions), dropped)
        width = config.text_encoders[-1].embed_dim
        empty = encode_conditioning(networks, batch(config, [""]), torch.tensor([False]))
        alone = encode_conditioning(networks, batch(config, ["a cup"]), torch.tensor([False]))
        if kind == "refiner":
            expected = (empty.context[0], empty.y[0, :width])
        else:
            expected = (torch.zeros(77, config.unet.context_dim), torch.zeros(width))
        assert torch.allclose(conditioning.context[1], expected[0], atol=EMPTY)
        assert torch.allclose(conditioning.y[1, :width], expected[1], atol=10 * EMPTY)  # behind another matrix
        numbers = embed_numbers(batch(config, captions).numbers)[1]
        assert torch.equal(conditioning.y[1, width:], numbers)  # the numbers stay
        assert not torch.equal(conditioning.context[0], conditioning.context[1])
        assert torch.allclose(conditioning.context[0], alone.context[0], atol=EMPTY)


@pytest.mark.parametrize(("first", "last"), [(0, 199), (0, 999), (500, 500)])
def test_steps_are_uniform_over_the_range_and_captions_dropped_at_their_rate(
    first: int, last: int, towers: dict[str, nn.Module]
) -> None:
    recorder = Recorder()
    networks = nn.ModuleDict({**towers, "unet": recorder})
    data = batch(BASE, ["a cup"] * 1000)
    for seed in range(4):
        loss = Objective(first, last, drop=0.1).loss(networks, data, torch.Generator().manual_seed(seed))
        assert float(loss) == pytest.approx(1, abs=0.02)  # of zeros: the noise's own variance
    assert min(recorder.timesteps) - first <= 0.01 * (last - first)
    assert last - max(recorder.timesteps) <= 0.01 * (last - first)
    assert sum(recorder.timesteps) / 4000 == pytest.approx((first + last) / 2, abs=0.02 * (last - first))
    assert 300 < recorder.dropped < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"first": -1},
        {"last": 1000},
        {"first": 300, "last": 200},
        {"drop": 1.5},
        {"weighting": "snr"},
        {"prediction": "x0"},
    ],
)
def test_ranges_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"found|unknown prediction 'x0'"):
        Objective(**fields)


def test_the_identity_of_an_epsilon_objective_is_that_of_older_states() -> None:
    settings = {"first": 0, "last": 199, "drop": 0.1, "weighting": "debiased"}
    assert Objective(**settings).identity == settings  # type: ignore[arg-type]
    assert Objective(**settings, prediction="v").identity == settings | {"prediction": "v"}  # type: ignore[arg-type]


def test_weightings_are_those_of_their_papers() -> None:
    sigma = NoiseSchedule().sigmas
    snr = 1 / sigma.double() ** 2
    assert torch.allclose(WEIGHTINGS["min-snr"](sigma).double(), snr.clamp(max=5) / snr, rtol=FLOAT32)
    assert torch.allclose(WEIGHTINGS["debiased"](sigma).double(), snr**-0.5, rtol=FLOAT32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_that_of_diffusers_training_scripts(prediction: str) -> None:
    """train_text_to_image_sdxl.py, with `--snr_gamma 5`: its lines, on the peer's scheduler."""
    noise_scheduler = scheduler(prediction)
    timesteps = torch.arange(1000)
    snr = compute_snr(noise_scheduler, timesteps)
    mse_loss_weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        mse_loss_weights = mse_loss_weights / snr
    elif noise_scheduler.config.prediction_type == "v_prediction":
        mse_loss_weights = mse_loss_weights / (snr + 1)
    weight = Objective(weighting="min-snr", prediction=prediction).weight(Prediction.sigma(timesteps))
    assert torch.allclose(weight, mse_loss_weights, rtol=1e-4)  # the peer's SNR comes from float32 levels


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weight_of_v_is_that_of_the_noise_it_implies(weighting: str) -> None:
    """The squared error of v is (1 + sigma^2) times that of the noise; "uniform" is 1 for both networks."""
    sigma = NoiseSchedule().sigmas
    epsilon = Objective(weighting=weighting).weight(sigma)
    v = Objective(weighting=weighting, prediction="v").weight(sigma)
    assert torch.equal(epsilon, WEIGHTINGS[weighting](sigma))
    if weighting == "uniform":
        assert torch.equal(v, torch.ones_like(sigma))
    else:
        assert torch.allclose(v * (1 + sigma**2), epsilon, rtol=FLOAT32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weighted_loss_is_that_of_each_picture_at_its_step(
    weighting: str, prediction: str, towers: dict[str, nn.Module]
) -> None:
    recorder = Recorder()
    networks = nn.ModuleDict({**towers, "unet": recorder})
    data = batch(BASE, ["a cup"] * 3)
    generator = torch.Generator().manual_seed(7)
    objective = Objective(weighting=weighting, prediction=prediction)
    loss = objective.loss(networks, data, generator)
    generator.manual_seed(7)
    torch.randint(0, 1000, (3,), generator=generator)
    noise = torch.randn(data.latents.shape, generator=generator)
    timesteps = torch.tensor(recorder.timesteps)
    target = noise if prediction == "epsilon" else scheduler().get_velocity(data.latents, noise, timesteps)
    weights = objective.weight(NoiseSchedule().sigmas[timesteps])
    expected = sum(float(w) * float((t**2).mean()) for w, t in zip(weights, target, strict=True)) / 3
    assert float(loss) == pytest.approx(expected, rel=FLOAT32)
