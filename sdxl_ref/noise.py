"""Where randomness comes from: always a generator that the caller hands in, never a global state."""

import secrets

import torch
from torch import Tensor

from sdxl_ref.config import InputError

Generator = torch.Generator | list[torch.Generator]


def draw_noise(shape: torch.Size | tuple[int, ...], generator: Generator) -> Tensor:
    """Standard normal noise of `shape` (b, ...) in float32, on the generator's device.

    One generator draws the whole batch at once. A list draws one image each, so that image i does not depend on
    the size of the batch; its length must be b (InputError otherwise).
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    if len(generator) != shape[0]:
        raise InputError(f"expected one generator per image ({shape[0]}), found {len(generator)}")
    one = (1, *shape[1:])
    return torch.cat([torch.randn(one, generator=g, device=g.device, dtype=torch.float32) for g in generator])


def fresh_generators(count: int) -> list[torch.Generator]:
    """One per image, seeded by the operating system."""
    return [torch.Generator().manual_seed(secrets.randbits(63)) for _ in range(count)]
