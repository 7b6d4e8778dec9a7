"""Adapters for tests: random ones in files, PEFT's on diffusers' networks, and the small models that they go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.on_network import Active, Loaded, NetworkAdapters
from sdxl_ref.adapters.places import adapted_parts, module_of
from sdxl_ref.config import ModelConfig
from sdxl_ref.weights.checkpoint import build_empty, prefixes

CONFIGS = {"base": peers.SMALL_BASE, "refiner": peers.SMALL_REFINER}
TINY = {"base": peers.TINY_BASE, "refiner": peers.TINY_REFINER}  # for what is not about their structure
UNET = ("unet",)
TOWER = ("text_encoder_2",)
SOME = ("attn1.to_q", "in_layers.2", "in_proj", "fc1", "c_fc")  # a matrix, a kernel, a stacked projection, text layers


def networks(config: ModelConfig) -> dict[str, nn.Module]:
    return {part: peers.network(part, config, i) for i, part in enumerate(prefixes(config))}


def pipeline(config: ModelConfig, **parts: Any) -> Any:
    """What adapters need of a pipeline: a configuration and networks, given or new."""
    own = {part: peers.network(part, config, i) for i, part in enumerate(adapted_parts(config))}
    return SimpleNamespace(**{"text_encoder": None, "config": config, **own, **parts})


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name) is not None}


def weights(pipe: Any) -> dict[str, Tensor]:
    """A copy of all weights that adapters can change."""
    state = {}
    for part, network in parts_of(pipe).items():
        state |= {f"{part}.{key}": tensor.clone() for key, tensor in network.state_dict().items()}
    return state


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit, dtypes included."""
    assert first.keys() == second.keys()
    return all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


def unet_inputs(config: ModelConfig) -> tuple[Tensor, ...]:
    def noise(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    x, context = noise(2, 4, 8, 8, seed=1), noise(2, 77, config.unet.context_dim, seed=2)
    return x, torch.tensor([3, 199]), context, noise(2, config.unet.adm_in_channels, seed=3)


def outputs(parts: dict[str, nn.Module], config: ModelConfig) -> list[Tensor]:
    tokens = torch.full((1, 77), 49407)
    tokens[0, 0] = 49406
    dtype = next(parts["unet"].parameters()).dtype
    given = [value.to(dtype) if value.is_floating_point() else value for value in unet_inputs(config)]
    found = [parts["unet"](*given), *parts["text_encoder_2"](tokens)]
    return [*found, parts["text_encoder"](tokens)] if "text_encoder" in parts else found


def put_on(parts: dict[str, nn.Module], *adapters: tuple[Adapter, float]) -> None:
    """In place of what was on networks before: several adapters, each with a scale."""
    for part, network in parts.items():
        loaded = {str(i): Loaded.of(adapter, part, "") for i, (adapter, _) in enumerate(adapters)}
        active = {str(i): Active(scale, i) for i, (_, scale) in enumerate(adapters)}
        NetworkAdapters.of(network).replace(network, loaded, active)


def random_file(
    config: ModelConfig,
    path: Path,
    seed: int = 0,
    rank: int = 3,
    layers: tuple[str, ...] = SOME,
    parts: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2"),
) -> Path:
    """An adapter in official names on the layers of some parts whose names hold one of these words."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for part, prefix in prefixes(config).items():
        if part in parts:
            for name, p in build_empty(part, config).named_parameters():
                if p.ndim >= 2 and any(x in name for x in layers):
                    shapes[prefix + module_of(name)] = p.shape
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.lora_A.weight"] = 0.1 * torch.randn((rank, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator)
        state[f"{name}.lora_B.weight"] = 0.1 * up
    save_file(state, path)
    return path


def with_peft(peer: nn.Module, targets: list[str], rank: int = 4, alpha: float = 2.0, **options: Any) -> Any:
    """The peer with a random adapter by the PEFT library in it."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(0)
    return inject_adapter_in_model(config, peer)


def peft_state(peer: nn.Module, prefix: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {f"{prefix}.{k}": v.clone() for k, v in get_peft_model_state_dict(peer).items()}


def kohya(state: dict[str, Tensor], alpha: float, names: dict[str, str]) -> dict[str, Tensor]:
    """PEFT's tensors as kohya's trainer names them; `names` are the prefixes of the parts."""
    found = {}
    for key, tensor in state.items():
        module, factor = key.rsplit(".lora_", 1)
        part, _, path = module.partition(".")
        name = names[part] + path.replace(".", "_")
        found[f"{name}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found
