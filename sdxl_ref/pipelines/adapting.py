"""Adapters (LoRA) of pipelines, with the ecosystem's names. Loaded when one of them is first called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_ref.adapters.active import Adapters


def adapters(pipe: Any) -> Adapters:
    """The adapters of a pipeline's networks."""
    return Adapters(*pipe.models())


def load_lora_weights(pipe: Any, path: str | Path, adapter_name: str | None = None) -> None:
    """Put an adapter (LoRA) on, under a name; without one, its file's. The same name again replaces it."""
    adapters(pipe).load(path, adapter_name)


def set_adapters(pipe: Any, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
    """Make these adapters the active ones, each at its weight; without weights, at 1."""
    adapters(pipe).set(adapter_names, adapter_weights)


def get_active_adapters(pipe: Any) -> list[str]:
    """The names of the adapters that change the weights now."""
    return adapters(pipe).active


def unload_lora_weights(pipe: Any) -> None:
    """Take all adapters off: the weights are what they were, bit for bit."""
    adapters(pipe).unload()
