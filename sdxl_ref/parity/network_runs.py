"""One network of anybody's, called on given inputs, its modules watched."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.parity import peers
from sdxl_ref.parity.recording import Recorder
from sdxl_ref.parity.replay import Replay
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.watching import Watcher, watched_network

Inputs = Sequence[Tensor]


def inputs_from(part: str, get: Callable[[Key], Tensor | None]) -> list[Any]:
    """What the network of a part was handed first, by key: a VAE's picture and latents, of which one may be None."""
    if part == "vae":
        return [get(Key(f"vae/{half}", 0, "in.0")) for half in ("encoder", "post_quant_conv")]
    return [value for i in range(4) if (value := get(Key(part, 0, f"in.{i}"))) is not None]


@torch.no_grad()
def recorded(
    network: Any, part: str, inputs: Inputs, dtype: torch.dtype | None, names: dict[str, str] | None = None
) -> Trace:
    """The trace of one call; of a function its inputs and outputs."""
    recorder = Recorder()
    run_watched(network, part, inputs, recorder, dtype, names)
    return recorder.trace


@torch.no_grad()
def recorded_truth(network: nn.Module, part: str, inputs: Inputs) -> Trace:
    """The outputs alone of a network that runs in float64, rounded once to float32: half of the memory."""
    recorder = Recorder(keeps=lambda key: key.is_output, widest=torch.float32)
    run_watched(network, part, inputs, recorder, torch.float32)
    return recorder.trace


@torch.no_grad()
def replayed(network: nn.Module, part: str, inputs: Inputs, theirs: Trace, truth: Trace | None) -> Replay:
    replay = Replay(theirs, truth)
    run_watched(network, part, inputs, replay, torch.float32)
    return replay


def run_watched(
    network: Any,
    part: str,
    inputs: Inputs,
    watcher: Watcher,
    dtype: torch.dtype | None,
    names: dict[str, str] | None = None,
) -> None:
    """Call a network with its modules watched. What it returns besides is shown under the part's own name."""
    given = [
        value.to(dtype) if dtype and value is not None and value.is_floating_point() else value for value in inputs
    ]
    with ExitStack() as stack:
        if isinstance(network, nn.Module):
            stack.enter_context(watched_network(network, part, watcher, names))
        call = peers.caller(network, part)
        if part == "vae":
            _run_vae(call, given, watcher)
            return
        output = tensors_of(call(*given))
        seen = isinstance(network, nn.Module) and names is None
        for i, value in enumerate(output):
            if not seen:  # a hook on the root has shown it otherwise
                watcher.returned(Key(part, 0, f"out.{i}"), value)


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """TypeError unless these are a tensor, or several."""
    values = output if isinstance(output, tuple) else (output,)
    if not all(isinstance(value, Tensor) for value in values):
        raise TypeError(f"expected a tensor, or a tuple of tensors, found {type(output).__name__}")
    return values


def _run_vae(call: Any, given: Sequence[Tensor | None], watcher: Watcher) -> None:
    images, latents = (*given, None)[:2]
    if images is not None:
        mean, logvar = call.encode(images)
        watcher.returned(Key("posterior/mean"), mean)
        watcher.returned(Key("posterior/logvar"), logvar)
    if latents is not None:
        watcher.returned(Key("vae/decoded"), call.decode(latents))
