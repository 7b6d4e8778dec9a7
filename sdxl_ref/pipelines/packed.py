"""Pack the networks of a pipeline for a CPU, and give their plain weights back. Loaded when it is asked to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from sdxl_ref.config import InputError
from sdxl_ref.networks import packing
from sdxl_ref.weights.checkpoint import PARTS


def pack(pipe: Any) -> None:
    """Pack a pipeline's networks for inference on this CPU, in place; those that are read when they work, then.

    See `sdxl_ref.pack`. InputError where one of them cannot be packed on this machine: then none is.
    """
    pipelines = pipe.models()
    for pipeline in pipelines:
        if pipeline.offload is not None and pipeline.offload.device.type != "cpu":
            raise InputError(
                f"the pipeline cannot be packed: its parts work on {pipeline.offload.device}: use it as it is"
            )
    networks = list(networks_of(pipelines))
    for network in networks:
        if packing.is_packed(network):
            continue
        is_read_later = packing.is_without_weights(network)
        dtypes = {parameter.dtype for parameter in network.parameters()}
        if why := packing.why_not_here(dtypes) if is_read_later else packing.why_not(network):
            raise InputError(f"the pipeline cannot be packed: {why}: use it as it is")
    change(pipelines, networks, packing.pack, packs=True)


def unpack(pipe: Any) -> None:
    """Have plain weights again, to the bit; only these are trained, saved or moved."""
    change(pipe.models(), networks_of(pipe.models()), packing.unpack, packs=False)


def change(
    pipelines: Sequence[Any],
    networks: Iterator[nn.Module] | Sequence[nn.Module],
    turn: Callable[..., nn.Module],
    packs: bool,
) -> None:
    """Turn networks into packed or plain ones, now, or when they are read."""
    for pipeline in pipelines:
        if pipeline.offload is not None:
            pipeline.offload.packs = packs
    for network in networks:
        if not packing.is_without_weights(network) and packing.is_packed(network) != packs:
            turn(network, consume=True)


def networks_of(pipelines: Sequence[Any]) -> Iterator[nn.Module]:
    """The networks, each once: pipelines may share one."""
    seen: set[int] = set()
    for pipeline in pipelines:
        for network in (getattr(pipeline, part) for part in PARTS):
            if network is not None and id(network) not in seen:
                seen.add(id(network))
                yield network
