"""One network, opened as one contestant opens it, and its seconds: a fresh process of bench.py's each time.

    contestants.py CONTESTANT FILE FOLDER PART DTYPE CASE … [--calls N] [--profile]

A case is PIXELSxBATCH of the UNet, PIXELS of a VAE, and the batch of a text tower. Prints one line of JSON: for each
case the seconds of the first call and of those after it, the page faults of the last one and a short fingerprint of
the output, and the process's peak of anonymous memory. With --profile it is for each case the operators of one more
call, the longest first: how often each was called, and its seconds. Everybody gets what a pipeline has in hand: the
text's outputs and the size numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.networks.packing import pack
from sdxl_ref.text.conditioning import embed_numbers
from sdxl_ref.weights.opening import open_checkpoint

Call = Callable[[], Tensor]
TOWERS = ("text_encoder", "text_encoder_2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, help="room for what a contestant keeps from one process to the next")
    parser.add_argument("part", choices=("unet", "encoder", "decoder", *TOWERS))
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    a = parser.parse_args()
    with torch.inference_mode():
        run = CONTESTANTS[a.contestant](a)
        read = profiled if a.profile else measured
        found: dict[str, Any] = {case: read(run(arguments(a, case)), a.calls) for case in a.cases}
    print(json.dumps(found | {"peak": peak_anonymous()}))


def measured(call: Call, calls: int) -> dict[str, Any]:
    """Once unseen: kernels are chosen, and packed by some, when a size is first met."""
    began = time.perf_counter()
    out = call()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(calls):
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - began)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    fingerprint = [float(out.double().mean()), float(out.double().norm())]
    return {"first": first, "seconds": seconds, "faults": faults, "fingerprint": fingerprint}


def profiled(call: Call, calls: int) -> dict[str, tuple[int, float]]:
    """Of the call after `calls` others: each operator's own time, without that of those it calls."""
    for _ in range(1 + calls):
        call()
    counted = getattr(call, "operators", None)
    if counted is not None:  # OpenVINO counts by itself
        return counted()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: (event.count, event.self_cpu_time_total / 1e6) for event in events}


def peak_anonymous() -> int:
    """Bytes: the highest resident size less the mapped file's pages that are there at the end."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]))


# --- what everybody gets ------------------------------------------------------------------------------------------


def arguments(a: argparse.Namespace, case: str) -> tuple[Tensor, ...]:
    """The same numbers for all contestants: of the UNet x, t, context, pooled and sizes; else pictures or tokens."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, a.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if a.part in TOWERS:
        tokens = torch.full((int(case), 77), 49407)
        tokens[:, 1:9] = torch.arange(320, 328)
        return (tokens,)
    pixels, batch = map(int, (*case.split("x"), 1)[:2])
    if a.part == "encoder":
        return (noise(batch, 3, pixels, pixels).clamp(-1, 1),)
    if a.part == "decoder":
        return (noise(batch, 4, pixels // 8, pixels // 8),)
    config = open_checkpoint(a.file).config
    width, numbers = config.unet.context_dim, [pixels, pixels, 0, 0]
    numbers = [*numbers, 6.0] if config.kind == "refiner" else [*numbers, pixels, pixels]
    x, context, pooled = noise(batch, 4, pixels // 8, pixels // 8), noise(batch, 77, width), noise(batch, 1280)
    return x, torch.full((batch,), 199), context, pooled, torch.tensor([numbers] * batch, dtype=torch.float32)


# --- ours ---------------------------------------------------------------------------------------------------------


def plain(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    return ours(a, load(a))


def packed(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    return ours(a, pack(load(a), consume=True))


def compiled(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    from types import SimpleNamespace

    from sdxl_ref.pipelines.compiled import compile_networks

    network = load(a)
    other = SimpleNamespace(encoder=nn.Identity(), decoder=nn.Identity())
    parts = {"unet": nn.Identity(), "vae": other} | {"unet" if a.part == "unet" else "vae": network}
    compile_networks([SimpleNamespace(**parts)])
    return ours(a, network)


def load(a: argparse.Namespace) -> nn.Module:
    return open_checkpoint(a.file).load(
        {"encoder": "vae", "decoder": "vae"}.get(a.part, a.part), getattr(torch, a.dtype)
    )


def ours(a: argparse.Namespace, network: Any) -> Callable[[tuple[Tensor, ...]], Call]:
    def unet(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, numbers: Tensor) -> Tensor:
        output: Tensor = network(x, t, context, torch.cat([pooled.float(), embed_numbers(numbers)], dim=1))
        return output

    def tower(tokens: Tensor) -> Tensor:
        output = network(tokens)
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden

    calls: dict[str, Callable[..., Tensor]] = {
        "unet": unet,
        "encoder": lambda images: network.encode(images).mean,
        "decoder": lambda latents: network.decode(latents),
    }
    call = calls.get(a.part, tower)
    return lambda given: lambda: call(*given)


# --- the others ---------------------------------------------------------------------------------------------------


def diffusers(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    return theirs(a, peer(a))


def diffusers_compiled(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    """With inductor's freezing, which packs the weights; for each size anew, which is the faster way."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    network = peer(a)
    for module in (network.encoder, network.decoder) if a.part in ("encoder", "decoder") else (network,):
        module.compile()
    return theirs(a, network)


def peer(a: argparse.Namespace) -> Any:
    """Loaded by assignment from our network of the same weights, so that one copy is in memory."""
    import peers

    network: Any = load(a)
    make = {"unet": peers.diffusers_unet, "encoder": peers.diffusers_vae, "decoder": peers.diffusers_vae}
    make |= {"text_encoder": peers.transformers_clip, "text_encoder_2": peers.transformers_openclip}
    return make[a.part](network)


def theirs(a: argparse.Namespace, network: Any) -> Callable[[tuple[Tensor, ...]], Call]:
    def unet(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, numbers: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": numbers}
        output: Tensor = network(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def tower(tokens: Tensor) -> Tensor:
        output: Tensor = network(tokens, output_hidden_states=True).hidden_states[-2]
        return output

    calls: dict[str, Callable[..., Tensor]] = {
        "unet": unet,
        "encoder": lambda images: network.encode(images).latent_dist.mean,
        "decoder": lambda latents: network.decode(latents).sample,
    }
    call = calls.get(a.part, tower)
    return lambda given: lambda: call(*given)


def openvino(a: argparse.Namespace) -> Callable[[tuple[Tensor, ...]], Call]:
    """Converted once from diffusers' network, with float16 weights; compiled for each size, which is the faster way."""
    import openvino as ov

    core = ov.Core()
    file = a.folder / f"{a.file.stem}-{a.part}.xml"
    if not file.exists():
        convert(a, file)

    def run(given: tuple[Tensor, ...]) -> Call:
        inputs = [tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in given]
        model = core.read_model(file)
        model.reshape({i: list(tensor.shape) for i, tensor in enumerate(inputs)})
        precision = {"float32": "f32", "bfloat16": "bf16"}[a.dtype]
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": a.profile}
        request = core.compile_model(model, "CPU", hints).create_infer_request()

        def call() -> Tensor:
            return torch.from_numpy(request.infer(inputs)[0])

        def operators() -> dict[str, tuple[int, float]]:
            found: dict[str, tuple[int, float]] = {}
            for node in request.profiling_info:
                count, total = found.get(node.node_type, (0, 0.0))
                found[node.node_type] = (count + 1, total + node.real_time.total_seconds())
            return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))

        call.operators = operators  # type: ignore[attr-defined]
        return call

    return run


def convert(a: argparse.Namespace, file: Path) -> None:
    """In a process of its own: the network in float32 and what is made of it want 20 GB together."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=converted, args=(a, file))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the conversion of {a.part} for OpenVINO ended with {process.exitcode}")


def converted(a: argparse.Namespace, file: Path) -> None:
    import openvino as ov

    a.dtype = "float32"
    case = "64x2" if a.part == "unet" else "64" if a.part in ("encoder", "decoder") else "2"
    with torch.inference_mode():
        given = arguments(a, case)
        model = ov.convert_model(Bare(a, peer(a)), example_input=given)
        ov.save_model(model, file, compress_to_fp16=True)


class Bare(nn.Module):
    """A network of diffusers or transformers that takes and returns tensors alone."""

    def __init__(self, a: argparse.Namespace, network: Any) -> None:
        super().__init__()
        self.network = network
        self.run = theirs(a, network)

    def forward(self, *given: Tensor) -> Tensor:
        return self.run(given)()


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Callable[[tuple[Tensor, ...]], Call]]] = {
    "ours, packed": packed,
    "ours, plain": plain,
    "ours, compiled": compiled,
    "diffusers": diffusers,
    "diffusers, compiled": diffusers_compiled,
    "OpenVINO": openvino,
}


if __name__ == "__main__":
    main()
