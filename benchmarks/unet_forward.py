"""One forward pass of the UNet, ours and diffusers' on the same tensors, in turns; prints the seconds as JSON.

A child of bench.py. Both get what a pipeline has in hand: the text's outputs and the size numbers. The peer is loaded
by assignment through `sdxl_ref.weights.layouts`, so that one copy of the weights serves both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from torch import Tensor

from sdxl_ref.text.conditioning import embed_numbers
from sdxl_ref.weights.opening import open_checkpoint

Forward = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    ours, theirs = forwards(a)
    with torch.inference_mode():
        distance = peers.distance(ours(), theirs())  # warms both up, too
        times = in_turns((ours, theirs), a.repeats, a.device)
    print(json.dumps({"ours": times[0], "diffusers": times[1], "distance": distance, "where": where(a.device)}))


def forwards(a: argparse.Namespace) -> tuple[Forward, Forward]:
    """Ours and the peer's, each without arguments."""
    dtype = getattr(torch, a.dtype)
    unet = open_checkpoint(a.file).load("unet", dtype, a.device)
    peer = peers.diffusers_unet(unet)
    if a.compile:
        unet, peer = torch.compile(unet), torch.compile(peer)

    def noise(*shape: int) -> Tensor:
        return torch.randn(a.batch, *shape, generator=generator).to(a.device, dtype)

    generator = torch.Generator().manual_seed(0)
    x, context, pooled = noise(4, a.pixels // 8, a.pixels // 8), noise(77, 1280), noise(1280)
    t = torch.full((a.batch,), 199, device=a.device)
    numbers = torch.tensor([[a.pixels, a.pixels, 0, 0, 6.0]] * a.batch, device=a.device)

    def ours() -> Tensor:
        return unet(x, t, context, torch.cat([pooled.float(), embed_numbers(numbers)], dim=1))

    def theirs() -> Tensor:
        added = {"text_embeds": pooled, "time_ids": numbers}
        return peer(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]

    return ours, theirs


def in_turns(functions: tuple[Forward, Forward], repeats: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of each call; who begins changes from turn to turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            wait(device)
            began = time.perf_counter()
            functions[i]()
            wait(device)
            times[i].append(time.perf_counter() - began)
    return times


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def where(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
