"""LoRA in training: against PEFT on diffusers' UNet, which layers learn, and what is learned."""

from dataclasses import replace
from typing import Any

import peers
import pytest
import torch
from adapter_files import put_on
from cases import diagonal
from torch import Tensor, nn

from sdxl_ref.adapters.writing import names_of
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.text.conditioning import encode_text
from sdxl_ref.training.adapters import Choice, LowRank, attach, learned
from sdxl_ref.training.diffusion import epsilon_errors
from sdxl_ref.weights.checkpoint import build

CONFIGS = {"base": peers.SMALL_BASE, "refiner": peers.SMALL_REFINER}


def networks(config: ModelConfig) -> dict[str, nn.Module]:
    names = ["unet", *["text_encoder"] * (config.kind == "base"), "text_encoder_2"]
    return {name: peers.network(name, config) for name in names}


def inputs(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    u = config.unet
    shapes = {"latents": (2, 4, 16, 16), "noise": (2, 4, 16, 16)}
    shapes |= {"context": (2, 77, u.context_dim), "y": (2, u.adm_in_channels)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fill(factors: nn.ModuleDict) -> None:
    """`up` is zero at first, which would leave `down` without a gradient."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for low in factors.values():
            low.up.copy_(0.1 * torch.randn(low.up.shape, generator=generator))  # type: ignore[operator, union-attr]


class Given(nn.Module):
    """Whatever it is asked, it says the same."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize(
    ("kind", "choice"), diagonal([*CONFIGS], [Choice(4, 2.0), Choice(3, None, ".", convolutions=True)])
)
def test_loss_and_gradients_of_a_step_equal_pefts(kind: str, choice: Choice) -> None:
    """PEFT puts its own layers on diffusers' UNet of the same weights."""
    from peft import LoraConfig, inject_adapter_in_model

    config = CONFIGS[kind]
    unet = networks(config)["unet"]
    peer = peers.diffusers_unet(unet)  # type: ignore[arg-type]
    factors = attach({"unet": unet}, config, choice)
    fill(factors)
    names = {place: name.removeprefix("unet.") for place, name in names_of("unet", config, "peft").items()}
    targets = [names[low.place] for low in factors.values()]  # type: ignore[index, union-attr]
    if choice.convolutions:
        assert any(isinstance(peer.get_submodule(name), nn.Conv2d) for name in targets)
    settings = LoraConfig(r=choice.rank, lora_alpha=choice.alpha or choice.rank, target_modules=targets)
    inject_adapter_in_model(settings, peer)
    layers: Any = {name: peer.get_submodule(names[low.place]) for name, low in factors.items()}  # type: ignore[index, union-attr]
    with torch.no_grad():
        for name, low in factors.items():
            layers[name].lora_A["default"].weight.copy_(low.down)
            layers[name].lora_B["default"].weight.copy_(low.up)

    given, t = inputs(config), torch.tensor([3, 150])
    loss = epsilon_errors(unet, given["latents"], t, given["noise"], given["context"], given["y"]).mean()
    loss.backward()
    import diffusers

    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pooled = given["y"][:, : config.text_encoders[-1].embed_dim]
    numbers = given["y"][:, config.text_encoders[-1].embed_dim :]
    peer.add_time_proj = Given(numbers.reshape(-1, 256))  # what was drawn stands for the embedded numbers
    added = {"text_embeds": pooled, "time_ids": numbers[:, ::256]}
    noisy = scheduler.add_noise(given["latents"], given["noise"], t)
    theirs = peer(noisy, t, encoder_hidden_states=given["context"], added_cond_kwargs=added).sample
    expected = ((theirs - given["noise"]) ** 2).mean()
    expected.backward()

    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-5 * float(expected.detach())
    ours = torch.cat([g.grad.flatten() for low in factors.values() for g in (low.down, low.up)])  # type: ignore[union-attr]
    others = [layers[name].lora_A["default"].weight.grad.flatten() for name in factors]
    others = [
        x
        for a, name in zip(others, factors, strict=True)
        for x in (a, layers[name].lora_B["default"].weight.grad.flatten())
    ]
    distance = peers.distance(ours, torch.cat(others))
    print(f"{kind}, {len(factors)} layers: distance of all gradients {distance:.1e}")
    assert distance <= 1e-5
    assert all(p.grad is None for p in unet.parameters())  # the weights themselves are frozen


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_learned_and_then_applied_is_what_was_trained(kind: str) -> None:
    """UNet and text encoders, stacked projections and convolutions: hooked networks against adapted fresh ones."""
    config = CONFIGS[kind]
    trained = networks(config)
    factors = attach(trained, config, Choice(3, 1.5, ".", convolutions=True, text_encoders=True))
    fill(factors)
    fresh = networks(config)
    adapter = learned(factors, {})
    assert {place.part for place in adapter.layers} == set(trained)
    put_on(fresh, (adapter, 1.0))
    states = [
        encode_text(each.get("text_encoder"), each["text_encoder_2"], ["a cup"], ["a cup"], "cpu")
        for each in (trained, fresh)
    ]
    for a, b in zip(*states, strict=True):
        assert peers.distance(a.detach(), b.detach()) <= 1e-5
    plain = encode_text(
        networks(config).get("text_encoder"), networks(config)["text_encoder_2"], ["a cup"], ["a cup"], "cpu"
    )
    assert peers.distance(states[0][1].detach(), plain[1].detach()) > 1e-3
    given = inputs(config)
    arguments = given["latents"], torch.tensor([3, 150]), given["context"], given["y"]
    with torch.no_grad():
        assert peers.distance(trained["unet"](*arguments), fresh["unet"](*arguments)) <= 1e-5
        assert peers.distance(trained["unet"](*arguments), networks(config)["unet"](*arguments)) > 1e-3


def test_at_first_nothing_is_changed() -> None:
    config = peers.SMALL_REFINER
    unet, given = networks(config)["unet"], inputs(config)
    arguments = given["latents"], torch.tensor([3, 150]), given["context"], given["y"]
    with torch.no_grad():
        before = unet(*arguments)
        attach({"unet": unet}, config, Choice())
        assert torch.equal(unet(*arguments), before)


def test_which_layers_learn() -> None:
    config = peers.SMALL_BASE
    whole = {name: build(name, config) for name in ("unet", "text_encoder", "text_encoder_2")}

    def keys(choice: Choice) -> set[tuple[str, str]]:
        fresh = {name: build(name, config) for name in whole}
        lows = attach(fresh, config, choice).values()
        assert all(isinstance(low, LowRank) for low in lows)
        return {(low.place.part, low.place.key) for low in lows}  # type: ignore[union-attr]

    attention = keys(Choice())
    assert {part for part, _ in attention} == {"unet"}
    assert all(".attn1.to_" in key or ".attn2.to_" in key for _, key in attention)
    queries = {("unet", k) for k, _ in whole["unet"].named_parameters() if k.endswith("attn2.to_q.weight")}
    assert keys(Choice(layers=r"attn2\.to_q")) == queries
    kernels = {("unet", k) for k, p in whole["unet"].named_parameters() if p.ndim == 4}
    assert keys(Choice(convolutions=True)) == attention | kernels
    towers = keys(Choice(text_encoders=True)) - attention
    assert {part for part, _ in towers} == {"text_encoder", "text_encoder_2"}
    assert not any("token_embedding" in key for _, key in keys(Choice(layers=".", text_encoders=True)))
    last = f"layers.{config.text_encoders[0].layers - 1}."
    assert not any(last in key for part, key in keys(Choice(layers=".", text_encoders=True)) if part == "text_encoder")
    assert keys(Choice(layers=r"down_blocks\.1\..*to_k"))  # a name of diffusers'


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    for alpha, expected in ((None, 4.0), (1.0, 1.0)):
        factors = attach(networks(peers.SMALL_REFINER), peers.SMALL_REFINER, Choice(4, alpha))
        [found] = {factors.alpha for factors in learned(factors, {}).layers.values()}
        assert found == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rank": 0}, "rank of a LoRA must be from 1 to 4096, found 0"),
        ({"layers": "("}, "regular expression"),
        ({"layers": r"^((.|..)+)+[!?]"}, "the layers to train: the pattern .* takes too long: write it without"),
        ({"layers": "attn3"}, "no layer has a name with 'attn3' in it: names are such as"),
    ],
)
def test_refusals(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach({"unet": build("unet", peers.SMALL_REFINER)}, peers.SMALL_REFINER, replace(Choice(), **choice))
