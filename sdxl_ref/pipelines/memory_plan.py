"""What memory a run will need, before any work: its networks run on the meta device, where tensors are sizes alone.

Loaded where a plan is asked for. `fitting` is the decision; its line names what would fit instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.diffusion.tiles import SIZE
from sdxl_ref.networks import bands, tiled_vae
from sdxl_ref.networks.freed_memory import KEPT_BLOCKS
from sdxl_ref.networks.heap_model import Heap
from sdxl_ref.networks.layers import Upsample
from sdxl_ref.networks.memory_model import peak_memory
from sdxl_ref.networks.unet import GEGLU
from sdxl_ref.networks.vae import AttnBlock, ResnetBlock
from sdxl_ref.pipelines.free_memory import free_memory
from sdxl_ref.weights.checkpoint import build_empty, prefixes

KERNELS = 7.5e7  # bytes: what a first run loads besides, measured: code, vocabulary, threads and their buffers
HALF_KERNELS = 2e7  # and in half precision
TOKENS = 77
LARGEST = 2**14  # pixels: from here on what is needed grows by the area
LARGEST_IN_BANDS = 2**10  # else the plan itself takes seconds
STAGE_PARTS = {"text": ("text_encoder", "text_encoder_2"), "encode": ("vae",), "unet": ("unet",), "decode": ("vae",)}


@dataclass(frozen=True)
class Run:
    """A run whose memory is planned; sizes in pixels, `dtype` that of the UNet and the text encoders."""

    config: ModelConfig
    height: int
    width: int
    pictures: int = 1
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    guided: bool = True
    encodes: bool = False  # whether it starts from a picture
    tiled: bool = False
    packed: bool = False
    low_memory: bool = False  # one network in memory at a time
    device: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """Bytes of the weights by part, and of each stage's evaluation besides."""

    run: Run
    weights: dict[str, int]
    stages: dict[str, int]

    @property
    def peak(self) -> int:
        """The most bytes at once that a process has more than before the run."""
        if not self.run.low_memory:
            return sum(self.weights.values()) + max(self.stages.values())
        own = {stage: sum(self.weights.get(part, 0) for part in STAGE_PARTS[stage]) for stage in self.stages}
        return max(own[stage] + needed for stage, needed in self.stages.items())

    def __str__(self) -> str:
        return f"{self.run.width} x {self.run.height} px needs about {in_gigabytes(self.peak)} of memory"


@lru_cache(maxsize=64)
def plan(run: Run) -> Plan:
    """What a run will need: see `Plan`. Pictures above LARGEST are planned by their area. Made once for equal runs."""
    networks = {part: build_empty(part, run.config).eval() for part in prefixes(run.config)}
    for part, network in networks.items():
        network.to(run.vae_dtype if part == "vae" else run.dtype)
    if run.packed:
        for network in networks.values():
            work_as_packed(network)
    weights = {part: size_of(network) for part, network in networks.items()}
    in_bands = run.tiled or run.packed
    heap = Heap(KEPT_BLOCKS, keeps_growing=False) if run.packed else Heap()
    kernels = KERNELS + (HALF_KERNELS if run.dtype.itemsize == 2 else 0)
    stages = {}
    for stage, (evaluate, factor) in evaluations(run, networks, LARGEST_IN_BANDS if in_bands else LARGEST).items():
        before = heap.size if run.low_memory else 0
        needed = peak_memory(evaluate, heap, onednn=run.device == "cpu", packed=run.packed) - before
        stages[stage] = int(kernels + factor * needed)
    return Plan(run, weights, stages)


def evaluations(run: Run, networks: dict[str, nn.Module], largest: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """One evaluation for each stage, in order, and how many times what it needs the stage does."""
    config = run.config
    vae: Any = networks["vae"]
    scale = 2 ** (len(config.vae.ch_mult) - 1)
    sides = run.pictures * (1 + run.guided)
    height, width = (min(side, largest) for side in (run.height, run.width))
    times = run.height * run.width / (height * width)
    decode: Any = tiled_vae.decode if run.tiled else lambda vae, z: vae.decode(z)
    encode: Any = tiled_vae.encode if run.tiled else lambda vae, images: vae.encode(images)
    window = SIZE if run.tiled else largest // scale
    h, w = (min(-(-side // scale), window) for side in (run.height, run.width))
    unet_times = 1.0 if run.tiled else times
    context = meta(sides, TOKENS, config.unet.context_dim, dtype=run.dtype)
    y = meta(sides, config.unet.adm_in_channels)
    x = meta(sides, config.unet.in_channels, h, w, dtype=run.dtype)
    tokens = meta(sides, TOKENS, dtype=torch.int64)
    towers = [networks[part] for part in STAGE_PARTS["text"] if part in networks]
    z = meta(1, config.vae.embed_dim, height // scale, width // scale, dtype=run.vae_dtype)
    images = meta(1, config.vae.in_channels, height, width, dtype=run.vae_dtype)
    stages: dict[str, tuple[Callable[[], Any], float]] = {
        "text": (lambda: [tower(tokens) for tower in towers], 1.0),
        "encode": (lambda: encode(vae, images), times),
        "unet": (lambda: networks["unet"](x, meta(sides), context, y), unet_times),
        "decode": (lambda: decode(vae, z), times),
    }
    if not run.encodes:
        del stages["encode"]
    return stages


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def size_of(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def work_as_packed(network: nn.Module) -> None:
    """Have a network allocate what a packed one does: see packed_layers.py and packed_vae.py."""
    forwards: dict[type[nn.Module], Any] = {
        GEGLU: packed_geglu,
        ResnetBlock: bands.resnet_block,
        Upsample: bands.upsample,
        AttnBlock: tiled_vae.attn_block,
    }
    for block in network.modules():
        if type(block) in forwards:
            block.forward = partial(forwards[type(block)], block)


def packed_geglu(block: Any, x: Tensor) -> Tensor:
    value_rows, gate_rows = block.proj.weight.chunk(2)
    gate = torch.nn.functional.linear(x, gate_rows)
    if x.dtype == torch.float32:
        gate = torch.nn.functional.gelu(gate)
    return torch.nn.functional.linear(x, value_rows).mul_(gate)


def fitting(run: Run, free: int | None = None) -> tuple[Run, str]:
    """A run that fits into so many free bytes, and a line that says so where that is not the run itself.

    That is the run, or the tiled one. free: None asks the system, and where that does not say, every run fits.
    InputError where neither fits, which names what would.
    """
    free = free_memory(run.device) if free is None else free
    wanted = plan(run)
    if free is None or wanted.peak <= free:
        return run, ""
    tiled = plan(replace(run, tiled=True))
    if tiled.peak <= free:
        line = f"memory: {wanted}, and {in_gigabytes(free)} is free: tiled, it needs {in_gigabytes(tiled.peak)}"
        return tiled.run, line
    raise InputError(f"{wanted}, and {in_gigabytes(free)} is free: {advice(run, free)}")


def advice(run: Run, free: int) -> str:
    """Which options, together, make a run fit, the fewest of them; or else a smaller picture."""
    options: dict[str, dict[str, Any]] = {"--tile": {"tiled": True}}
    if run.dtype.itemsize > 2:
        options["--dtype bfloat16"] = {"dtype": torch.bfloat16}
    if not run.low_memory:
        options["--low-memory"] = {"low_memory": True}
    names = list(options)
    choices = [[name] for name in names] + [list(pair) for pair in combinations(names, 2)] + [names]
    for chosen in choices:
        changes = {key: value for name in chosen for key, value in options[name].items()}
        smaller = plan(replace(run, **changes))
        if smaller.peak <= free:
            return f"use {' and '.join(chosen)}, which needs {in_gigabytes(smaller.peak)}, or a smaller picture"
    least = f"{', '.join(names)} together need {in_gigabytes(smaller.peak)}"
    return f"use a smaller picture or batch, or a machine with more memory ({least})"


def in_gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
