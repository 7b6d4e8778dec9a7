"""The noise prediction loss: against diffusers' UNet on the same weights, and its parts."""

from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from sdxl_ref import layouts
from sdxl_ref.checkpoint import build
from sdxl_ref.conditioning import embed_numbers
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.training.diffusion import WEIGHTINGS, Batch, Objective, conditioning, epsilon_errors, noised

CONFIGS = {"base": peers.SMALL_BASE, "refiner": peers.SMALL_REFINER}


def parts(config: ModelConfig, seed: int = 0) -> nn.ModuleDict:
    names = ["unet", *["text_encoder"] * (config.kind == "base"), "text_encoder_2"]
    return nn.ModuleDict({name: peers.randomise(build(name, config), seed) for name in names})


def batch(config: ModelConfig, captions: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(captions), 4, 8, 8, generator=generator)
    numbers = torch.tensor([[128, 96, 0, 8, 6.0]] if config.kind == "refiner" else [[128, 96, 0, 8, 64, 64.0]])
    return Batch(latents, captions, numbers.expand(len(captions), -1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_of_a_step_equal_diffusers(kind: str) -> None:
    """The peer adds the noise with its own scheduler, embeds the numbers itself, and takes its own mean."""
    import diffusers

    config = CONFIGS[kind]
    networks = parts(config)
    data = batch(config, ["a cup", "two cups", "three"])
    t = torch.tensor([3, 120, 199] if kind == "refiner" else [3, 500, 999])
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(2))
    context, y = conditioning(networks, data, torch.zeros(3, dtype=torch.bool))
    unet = networks["unet"].requires_grad_(True)
    loss = epsilon_errors(unet, data.latents, t, noise, context, y).mean()
    loss.backward()

    peer = peers.diffusers_unet(unet).requires_grad_(True)  # type: ignore[arg-type]
    for p in peer.parameters():  # the weights are shared: their gradients must not be
        p.grad = None
        p.data = p.data.clone()
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = scheduler.add_noise(data.latents, noise, t)
    pooled = y[:, : config.text_encoders[-1].embed_dim]
    added = {"text_embeds": pooled, "time_ids": data.numbers}
    theirs = peer(noisy, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    expected = ((theirs - noise) ** 2).mean()
    expected.backward()

    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-5 * float(expected.detach())
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    rules = layouts.rules("unet", unet.state_dict(), unet.config)
    translated = layouts.to_other(rules, gradients)  # type: ignore[arg-type]
    found = dict(peer.named_parameters())
    assert translated.keys() == found.keys()
    whole = [
        torch.cat([g.flatten() for g in each]) for each in (translated.values(), [found[k].grad for k in translated])
    ]
    distance = peers.distance(*whole)
    print(f"{kind}: loss {float(loss.detach()):.6f}, distance of all gradients {distance:.1e}")
    assert distance <= 1e-5
    floor = 1e-6 * float(whole[1].norm())  # a GroupNorm of one channel a group hides what is added before it
    for name, p in found.items():
        assert float((translated[name] - p.grad).norm()) <= 1e-5 * float(p.grad.norm()) + floor, name


def test_noised_latents_are_those_of_ddpm() -> None:
    import diffusers

    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(noised(x, t, noise), scheduler.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)


def test_dropped_captions_are_zeros_on_a_base_and_empty_on_a_refiner() -> None:
    for kind, config in CONFIGS.items():
        networks, captions = parts(config), ["a cup", "a cup", "two"]
        context, y = conditioning(networks, batch(config, captions), torch.tensor([False, True, False]))
        width = config.text_encoders[-1].embed_dim
        empty = conditioning(networks, batch(config, [""]), torch.tensor([False]))
        expected = (torch.zeros(77, config.unet.context_dim), torch.zeros(width))
        if kind == "refiner":
            expected = empty[0][0], empty[1][0, :width]
        assert torch.allclose(context[1], expected[0], atol=1e-6)
        assert torch.allclose(y[1, :width], expected[1], atol=1e-5)
        assert torch.equal(y[1, width:], embed_numbers(batch(config, captions).numbers)[1])  # the numbers stay
        assert not torch.equal(context[0], context[1])
        assert torch.allclose(
            context[0], conditioning(networks, batch(config, ["a cup"]), torch.tensor([False]))[0][0], atol=1e-6
        )


class Seen(nn.Module):
    """A UNet that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.gone = 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        self.steps += t.tolist()
        self.gone += int((context.abs().sum(dim=(1, 2)) == 0).sum())
        return torch.zeros_like(x)


@pytest.mark.parametrize(("first", "last"), [(0, 199), (0, 999), (500, 500)])
def test_steps_are_uniform_over_the_range_and_captions_dropped_at_their_rate(first: int, last: int) -> None:
    networks = parts(peers.SMALL_BASE)
    networks["unet"] = seen = Seen()
    data = batch(peers.SMALL_BASE, ["a cup"] * 1000)
    for seed in range(4):
        loss = Objective(first, last, drop=0.1).loss(networks, data, torch.Generator().manual_seed(seed))
        assert float(loss) == pytest.approx(1, abs=0.02)  # of zeros: the noise's own variance
    assert min(seen.steps) - first <= 0.01 * (last - first)
    assert last - max(seen.steps) <= 0.01 * (last - first)
    assert sum(seen.steps) / 4000 == pytest.approx((first + last) / 2, abs=0.02 * (last - first))
    assert 300 < seen.gone < 500


@pytest.mark.parametrize(
    "fields", [{"first": -1}, {"last": 1000}, {"first": 300, "last": 200}, {"drop": 1.5}, {"weighting": "snr"}]
)
def test_ranges_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="found"):
        Objective(**fields)


def test_weightings_are_those_of_their_papers() -> None:
    sigma = NoiseSchedule().sigmas
    snr = 1 / sigma.double() ** 2
    assert torch.allclose(WEIGHTINGS["min-snr"](sigma).double(), snr.clamp(max=5) / snr, rtol=1e-5)
    assert torch.allclose(WEIGHTINGS["debiased"](sigma).double(), snr**-0.5, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weighted_loss_is_that_of_each_picture_at_its_step(weighting: str) -> None:
    networks = parts(peers.SMALL_BASE)
    networks["unet"] = seen = Seen()
    data, generator = batch(peers.SMALL_BASE, ["a cup"] * 3), torch.Generator().manual_seed(7)
    loss = Objective(weighting=weighting).loss(networks, data, generator)
    generator.manual_seed(7)
    torch.randint(0, 1000, (3,), generator=generator)
    noise = torch.randn(data.latents.shape, generator=generator)
    weights = WEIGHTINGS[weighting](NoiseSchedule().sigmas[torch.tensor(seen.steps)])
    expected = sum(float(w) * float((n**2).mean()) for w, n in zip(weights, noise, strict=True)) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)
