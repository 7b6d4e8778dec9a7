"""Ours and diffusers' on one GPU, in turns: `python benchmarks/gpu.py --out gpu.md`, in 8 minutes with its set-up.

The weights are drawn on the card; nothing is downloaded. Measured, in this order: the card's matrix rate; the UNet at
1024 px, batch 2, in bfloat16 and float16, in the usual layout, channels-last, and compiled with CUDA graphs; a refine
of 50 steps at strength 0.3 and an ensemble of 50 steps; the tests that want a GPU. What the budget of seconds does not
reach is named as left out. `--small --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import pairs  # noqa: E402
import peers  # noqa: E402
from lower_bound import of_unet  # noqa: E402

from sdxl_ref import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline  # noqa: E402
from sdxl_ref.config import BASE_1_0, REFINER_1_0  # noqa: E402
from sdxl_ref.text.conditioning import embed_numbers  # noqa: E402
from sdxl_ref.weights.checkpoint import build_empty, prefixes  # noqa: E402

SIDES = ("ours", "diffusers")
LAYOUTS = {"usual layout": torch.contiguous_format, "channels-last": torch.channels_last}
Times = dict[str, list[float]]


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.device = torch.device(a.device)
        self.small = a.small
        self.ends = time.monotonic() + a.budget
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.rates: dict[torch.dtype, float] = {}
        configs = (peers.TINY_REFINER, peers.TINY_BASE) if a.small else (REFINER_1_0, BASE_1_0)
        self.refiner, self.base = configs
        pairs.CONFIGS |= {"refiner": self.refiner, "base": self.base}

    def is_over(self, what: str, wanted: float) -> bool:
        """Whether so many seconds are not left, which is told."""
        if self.small or time.monotonic() + wanted < self.ends:
            return False
        self.notes.append(f"left out, since the time was up: {what}")
        return True

    # --- the networks ---------------------------------------------------------------------------------------------

    def networks(self, kind: str, dtype: torch.dtype) -> dict[str, Any]:
        """Weights drawn on the device, in official shapes: matrices at 1/sqrt(fan-in), norms near 1."""
        config = {"refiner": self.refiner, "base": self.base}[kind]
        made: dict[str, Any] = {}
        for part in prefixes(config):
            network = build_empty(part, config).to(dtype)  # the VAE too, as diffusers has it in bfloat16
            network = network.to_empty(device=self.device).eval().requires_grad_(False)
            generator = torch.Generator(self.device).manual_seed(0)
            for name, parameter in network.named_parameters():
                fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 400
                parameter.normal_(generator=generator).mul_(1 / math.sqrt(fan_in))
                if parameter.ndim == 1 and name.endswith("weight"):
                    parameter.add_(1)
            made[part] = network
        return made

    def in_turns(self, calls: dict[str, Callable[[], Any]], turns: int) -> Times:
        """Seconds of each call; who begins changes from turn to turn. Each is called once unseen."""
        times: Times = {side: [] for side in calls}
        for turn in range(-1, turns):
            for side in calls if turn % 2 == 0 else reversed(calls):
                self.wait()
                began = time.perf_counter()
                calls[side]()
                self.wait()
                if turn >= 0:
                    times[side].append(time.perf_counter() - began)
        return times

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, call: Callable[[], Any]) -> float:
        """Bytes on the card while it works; 0 elsewhere."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return float(torch.cuda.max_memory_allocated(self.device))

    # --- what is measured -----------------------------------------------------------------------------------------

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large product: what the card gives, not what its sheet says."""
        side = 256 if self.small else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        times = self.in_turns({"product": lambda: a @ b}, 10)["product"]
        return 2 * side**3 / min(times)

    def unet(self, dtype: torch.dtype) -> None:
        unet = self.networks("refiner", dtype)["unet"]
        calls = unet_calls(unet, peers.diffusers_unet(unet), 64 if self.small else 1024, self.device, dtype)
        self.rates[dtype] = self.matrix_rate(dtype)
        work = operations(self.refiner, 64 if self.small else 1024)
        for layout, memory_format in LAYOUTS.items():
            unet.to(memory_format=memory_format)
            self.row(f"UNet, {name_of(dtype)}, {layout}", calls, 3 if self.small else 20, work / self.rates[dtype])
        unet.to(memory_format=torch.contiguous_format)

    def compiled(self, dtype: torch.dtype) -> None:
        """With CUDA graphs, each side by its own module; minutes, most of it in compiling."""
        unet = self.networks("refiner", dtype)["unet"]
        peer = peers.diffusers_unet(unet)
        for module in (unet, peer):
            how = {"backend": "eager"} if self.small else {"mode": "reduce-overhead"}
            module.compile(fullgraph=True, **how)
        calls = unet_calls(unet, peer, 64 if self.small else 1024, self.device, dtype)
        self.rates.setdefault(dtype, self.matrix_rate(dtype))
        work = operations(self.refiner, 64 if self.small else 1024)
        began = time.monotonic()
        self.row(
            f"UNet, {name_of(dtype)}, compiled, CUDA graphs", calls, 3 if self.small else 20, work / self.rates[dtype]
        )
        self.notes.append(f"compiling both in {name_of(dtype)}: {time.monotonic() - began:.0f} s")

    def pipelines(self, dtype: torch.dtype) -> None:
        """Whole runs, from the prompt to the picture: a refine on both sides, and the ensemble."""
        made = {"refiner": self.networks("refiner", dtype)}
        pairs.networks = made.__getitem__  # type: ignore[assignment]
        ours = ImageToImagePipeline(self.refiner, **made["refiner"])
        steps, pixels = (4, 64) if self.small else (50, 1024)
        image = pairs.picture().resize((pixels, pixels))

        def refine(pipe: Any) -> Any:
            generator = torch.Generator().manual_seed(0)
            return pipe(
                "a cup",
                image=image,
                strength=0.3 if steps == 50 else 0.5,
                num_inference_steps=steps,
                generator=generator,
            )

        theirs = pairs.diffusers_refiner()
        calls = {"ours": lambda: refine(ours), "diffusers": lambda: refine(theirs)}
        self.row(f"refine, {pixels} px, {steps} steps at strength 0.3, {name_of(dtype)}", calls, 1 if self.small else 3)
        if self.is_over("the ensemble", 60):
            return
        made["base"] = self.networks("base", dtype)
        both = EnsemblePipeline(TextToImagePipeline(self.base, **made["base"]), ours)
        call = lambda: both("a cup", height=pixels, width=pixels, num_inference_steps=steps)  # noqa: E731
        self.row(f"ensemble, {pixels} px, {steps} steps, {name_of(dtype)}", {"ours": call}, 1)

    def gpu_tests(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "tests/diffusion/test_sampler_promises.py"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.notes.append(f"tests: {ran.stdout.strip().splitlines()[-1]}")

    def row(self, what: str, calls: dict[str, Callable[[], Any]], turns: int, bound: float | None = None) -> None:
        try:
            times = self.in_turns(calls, turns)
        except Exception as error:  # one that fails leaves the others their place in the table
            self.notes.append(f"{what} failed: {str(error).splitlines()[0]}")
            return
        cells = [what]
        for side in SIDES:
            if side in times:
                cells.append(f"{1e3 * statistics.median(times[side]):.1f} ms, {self.peak(calls[side]) / 1e9:.2f} GB")
            else:
                cells.append("")
        ratio = [a / b for a, b in zip(*times.values(), strict=True)] if len(times) == 2 else []
        cells.append(f"{statistics.median(ratio):.2f}" if ratio else "")
        cells.append(f"{bound / statistics.median(times['ours']):.0%}" if bound else "")
        self.rows.append(cells)
        print(" | ".join(cells), file=sys.stderr, flush=True)

    def markdown(self) -> str:
        head = ["", "ours", "diffusers", "ratio", "ours: share of the matrix rate"]
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *self.rows)]
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        rates = ", ".join(f"{name_of(dtype)} {rate / 1e12:.1f} TFLOP/s" for dtype, rate in self.rates.items())
        packages = ", ".join(f"{package} {version(package)}" for package in ("sdxl-ref", "torch", "diffusers"))
        notes = [f"Device: {name}; matrix rate: {rates}.", f"Versions: {packages}, CUDA {torch.version.cuda}."]
        return "\n".join([*lines, "", *(f"- {note}" for note in (*notes, *self.notes)), ""])


def unet_calls(
    unet: nn.Module, peer: Any, pixels: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Both UNets on the same two pictures."""
    width = unet.config.context_dim  # type: ignore[union-attr]
    pooled_width = unet.config.adm_in_channels - 5 * 256  # type: ignore[union-attr,operator]
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, pixels // 8, pixels // 8), (2, 77, width), (2, pooled_width))
    x, context, pooled = (
        torch.randn(*shape, generator=generator, device=device).to(dtype)  # type: ignore[arg-type]
        for shape in shapes
    )
    t, numbers = torch.full((2,), 199, device=device), torch.tensor([[pixels, pixels, 0, 0, 6.0]] * 2, device=device)
    added = {"text_embeds": pooled, "time_ids": numbers}
    return {
        "ours": lambda: unet(x, t, context, torch.cat([pooled.float(), embed_numbers(numbers)], dim=1)),
        "diffusers": lambda: peer(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0],
    }


def operations(config: Any, pixels: int) -> int:
    """Of one evaluation of two pictures, counted on the meta device."""
    with torch.device("meta"):
        return sum(of_unet(build_empty("unet", config), pixels, batch=2).values())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--budget", type=float, default=460, metavar="SECONDS", help="no part begins that would end later"
    )
    parser.add_argument("--small", action="store_true", help="tiny networks: to try the script, not to measure")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table there")
    a = parser.parse_args()
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu: expected a GPU that this PyTorch can use, found none", file=sys.stderr)
        return 2
    bench = Bench(a)
    for dtype in (torch.bfloat16, torch.float16):
        if not bench.is_over(f"the UNet in {name_of(dtype)}", 30):
            bench.unet(dtype)
    if not bench.is_over("whole runs", 90):
        bench.pipelines(torch.bfloat16)
    if not bench.small and not bench.is_over("the tests that want a GPU", 40):
        bench.gpu_tests()
    for dtype in (torch.bfloat16, torch.float16):
        if not bench.is_over(f"the UNet compiled in {name_of(dtype)}", 170):
            bench.compiled(dtype)
    text = bench.markdown()
    print(text)
    if a.out:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
