"""Adapters by the LyCORIS library: random ones on diffusers' and transformers' networks, and what these then answer."""

from __future__ import annotations

import logging
from typing import Any

import peers
import torch
from adapter_files import networks, unet_inputs
from torch import Tensor, nn

from sdxl_ref.config import ModelConfig

PREFIXES = {"unet": "lycoris", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SIZES = {"locon": 0.1, "loha": 0.05, "lokr": 0.2, "full": 0.05}  # of the noise: changes of some percent of a weight
MODULES = ["Linear", "Conv2d", "LayerNorm", "GroupNorm"]


def with_lycoris(peer: nn.Module, prefix: str, algo: str, **options: Any) -> Any:
    """A random adapter on every layer of a network, active there: LyCORIS' own object."""
    from lycoris import LycorisNetwork
    from lycoris.logging import logger

    logger.setLevel(logging.ERROR)
    LycorisNetwork.apply_preset({"target_module": MODULES, "target_name": [], "lora_prefix": prefix})
    sizes = {"lora_dim": 2, "conv_lora_dim": 2, "alpha": 1.5, "conv_alpha": 1.5}
    net = LycorisNetwork(peer, 1.0, network_module=algo, **sizes, **options)
    net.apply_to()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("dora_scale"):
                parameter *= 1 + 0.1 * noise
            else:
                parameter += SIZES.get(algo, 0.1) * noise
    return net


class Peers:
    """The peers of a small model's networks with LyCORIS' adapters on them."""

    def __init__(self, config: ModelConfig, algo: str, **options: Any) -> None:
        parts: Any = networks(config)
        self.config = config
        self.models = {
            "unet": peers.diffusers_unet(parts["unet"]),
            "text_encoder_2": peers.transformers_openclip(parts["text_encoder_2"]),
        }
        if "text_encoder" in parts:
            self.models["text_encoder"] = peers.transformers_clip(parts["text_encoder"])
        self.nets = {part: with_lycoris(peer, PREFIXES[part], algo, **options) for part, peer in self.models.items()}

    def state(self) -> dict[str, Tensor]:
        """What LyCORIS writes of all of them."""
        state = {}
        for net in self.nets.values():
            state |= {key: tensor.detach().clone().contiguous() for key, tensor in net.state_dict().items()}
        return state

    def outputs(self, scale: float) -> list[Tensor]:
        """As `adapter_files.outputs` has them, at a scale."""
        for net in self.nets.values():
            net.set_multiplier(scale)
        tokens = torch.full((1, 77), 49407)
        tokens[0, 0] = 49406
        unet = peers.call_diffusers_unet(self.models["unet"], *unet_inputs(self.config))
        second = self.models["text_encoder_2"](tokens, output_hidden_states=True)
        answers = [unet, second.hidden_states[-2], second.text_embeds]
        if "text_encoder" in self.models:
            answers.append(self.models["text_encoder"](tokens, output_hidden_states=True).hidden_states[-2])
        return answers
