"""Our networks in float64 without a second copy of them: each module's weights are widened while it works."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.pipelines.packed import networks_of


@contextmanager
def exact(network: nn.Module) -> Iterator[None]:
    """Every module computes in float64, from weights as they are; tensors that it is handed are widened too.

    What is no module's, in a network's own lines, is float64 with its inputs; sinusoids stay float32, by definition.
    """
    running: list[dict[str, Any]] = []
    handles = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running.append(dict(module._parameters))
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = nn.Parameter(parameter.double(), requires_grad=False)
        return tuple(map(widened, args)), {name: widened(value) for name, value in kwargs.items()}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(running.pop())

    for module in network.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def exact_pipeline(pipe: Any) -> Iterator[None]:
    """All networks of a pipeline in float64; what goes from one to the next is float32, as in every run."""
    with ExitStack() as stack, torch.no_grad():
        for network in networks_of(pipe.models()):
            stack.enter_context(exact(network))
        yield
