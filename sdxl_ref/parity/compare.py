"""Two implementations of one network on the same inputs: `parity.compare(reference, candidate, inputs)`."""

from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.clip_l import CLIPTextEncoder
from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.parity import peers
from sdxl_ref.parity.diagnosis import diagnose
from sdxl_ref.parity.exact import exact
from sdxl_ref.parity.kit import copy_in, in_layout, two_runs
from sdxl_ref.parity.network_runs import Inputs, recorded, recorded_truth, replayed
from sdxl_ref.parity.report import Budget, Report, judge
from sdxl_ref.parity.trace import Trace

PARTS: dict[type[nn.Module], str] = {
    UNet: "unet",
    AutoencoderKL: "vae",
    CLIPTextEncoder: "text_encoder",
    OpenCLIPTextEncoder: "text_encoder_2",
}


def compare(
    reference: nn.Module, candidate: Any, inputs: Inputs, dtype: torch.dtype | None = None, causes: bool = True
) -> Report:
    """Where a candidate differs from one of our networks, which module is at fault, and what explains it.

    inputs: those of the network's forward, float32: x, timesteps, context, y of a UNet; tokens of a text tower;
    pictures (b,3,H,W) in [-1,1] and latents (b,4,h,w) of a VAE, of which either may be None. The candidate is a
    network with our names; diffusers', transformers' or open_clip's; or any function of the inputs, or a compiled
    network, whose outputs alone are seen.
    `dtype` is that in which it computes; None: that of its parameters or of its first output.
    """
    part = part_of(reference)
    dtype = dtype or dtype_of(candidate)
    if hasattr(candidate, "_orig_mod"):  # of torch.compile: a graph, which is seen from outside
        graph = candidate
        candidate = lambda *args: graph(*args)  # noqa: E731
    names = names_for(candidate, reference, part)
    theirs = None
    if dtype is None:  # of a function: what it returns says so
        theirs = recorded(candidate, part, inputs, dtype, names)
        floats = (v.dtype for v in theirs.values.values() if isinstance(v, Tensor) and v.is_floating_point())
        dtype = next(floats, torch.float32)
    with exact(reference):
        truth = recorded_truth(reference, part, inputs)
        budget = budget_of(reference, part, inputs, truth, dtype)
    theirs = theirs or recorded(candidate, part, inputs, dtype, names)
    with exact(reference):
        replay = replayed(reference, part, inputs, theirs, truth)
    report = judge(replay.checks, replay.inherited, theirs, truth, budget)
    if causes and report.culprits:
        report.causes = diagnose(reference, part, inputs, theirs, report, replay.checks)
    return report


def part_of(network: nn.Module) -> str:
    """InputError for what is none of our networks."""
    for kind, part in PARTS.items():
        if isinstance(network, kind):
            return part
    raise InputError(f"expected one of our networks as the reference, found {type(network).__name__}")


def names_for(candidate: Any, reference: nn.Module, part: str) -> dict[str, str] | None:
    """The official names of a candidate's modules, by its own; None where it is one of ours, or has no modules."""
    if not isinstance(candidate, nn.Module) or isinstance(candidate, type(reference)):
        return None
    own = {name for name, _ in candidate.named_modules()}
    ours = own & {name for name, _ in reference.named_modules() if name}
    if len(ours) > len(own) // 2:
        return {name: name for name in ours}  # without the root, whose inputs and outputs may be others
    known = peers.names_of(part, reference)
    names = {name: official for name, official in known.items() if name in own}
    return names if len(names) > 3 else None


def dtype_of(candidate: Any) -> torch.dtype | None:
    parameters = candidate.parameters() if isinstance(candidate, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)


def budget_of(network: nn.Module, part: str, inputs: Inputs, truth: Trace, dtype: torch.dtype) -> Budget:
    """Our own rounding in a dtype: of each module alone on its input, and along the run. `network` runs in float64."""

    def own(layout: torch.memory_format) -> Trace:
        ours = copy_in(network, dtype)
        with in_layout(ours, layout):
            return recorded(ours, part, inputs, dtype)

    return two_runs(own, lambda trace: replayed(network, part, inputs, trace, truth), truth, dtype)
