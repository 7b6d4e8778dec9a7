"""What no kernel goes under: the operations of a network, over this machine's rates of matrices and convolutions.

A child of bench.py: `lower_bound.py rates` measures the rates, `lower_bound.py operations` counts; both print JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_ref.config import BASE_1_0, REFINER_1_0
from sdxl_ref.networks.packing import pack
from sdxl_ref.weights.checkpoint import build_empty

CASES = [f"{pixels}x{batch}" for pixels in (256, 512, 1024) for batch in (1, 2)]


def rates() -> dict[str, dict[str, float]]:
    """Operations a second, the best of several shapes and calls, packed and plain."""
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrices, convolutions = [0.0], [0.0]
        for rows, width, columns in ((2048, 2048, 2048), (4096, 1536, 6144), (2048, 768, 6144)):
            linear = nn.Linear(width, columns, dtype=dtype)
            seconds = best((linear, pack(linear)), torch.randn(rows, width, dtype=dtype))
            matrices.append(2 * rows * width * columns / seconds)
        for channels, side in ((384, 64), (768, 32), (1536, 16), (128, 256)):
            convolution = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
            seconds = best((convolution, pack(convolution)), torch.randn(2, channels, side, side, dtype=dtype))
            convolutions.append(2 * 2 * 9 * channels**2 * side**2 / seconds)
        found[str(dtype).removeprefix("torch.")] = {"matrices": max(matrices), "convolutions": max(convolutions)}
    return found


def best(layers: tuple[nn.Module, nn.Module], x: Tensor, calls: int = 7) -> float:
    """Seconds of the quickest call, of either layer."""
    seconds = []
    for layer in layers * calls:
        began = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def operations() -> dict[str, dict[str, int]]:
    """Of each network and case, multiplications and additions both: those of convolutions, and all others' products."""
    found = {}
    with torch.device("meta"):
        for config in (REFINER_1_0, BASE_1_0):
            unet = build_empty("unet", config)
            for case in CASES:
                pixels, batch = map(int, case.split("x"))
                found[f"{config.kind} unet {case}"] = of_unet(unet, pixels, batch)
        vae = build_empty("vae", REFINER_1_0)
        for pixels in (512, 1024):
            image, latents = torch.randn(1, 3, pixels, pixels), torch.randn(1, 4, pixels // 8, pixels // 8)
            found[f"refiner encoder {pixels}"] = counted(lambda: vae.encode(image).mean)  # type: ignore[operator]  # noqa: B023
            found[f"refiner decoder {pixels}"] = counted(lambda: vae.decode(latents))  # type: ignore[operator]  # noqa: B023
    return found


def of_unet(unet: Any, pixels: int, batch: int) -> dict[str, int]:
    """Of one evaluation; the network is on the meta device, on which this is called."""
    config = unet.config
    x, context = torch.randn(batch, 4, pixels // 8, pixels // 8), torch.randn(batch, 77, config.context_dim)
    t, y = torch.full((batch,), 199), torch.randn(batch, config.adm_in_channels)
    return counted(lambda: unet(x, t, context, y))


def counted(call: Callable[[], Tensor]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(count for operator, count in counts.items() if "convolution" in operator)
    return {"convolutions": convolutions, "matrices": sum(counts.values()) - convolutions}


@torch.inference_mode()
def main(what: str) -> None:
    print(json.dumps({"rates": rates, "operations": operations}[what]()))


if __name__ == "__main__":
    main(sys.argv[1])
