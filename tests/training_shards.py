"""For the tests of sharded training: runs in processes that note what they hold, encode and load."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import run_command

from sdxl_ref.training import data, finetune
from sdxl_ref.training.loop import MOMENTS
from sdxl_ref.training.shard_plan import units
from sdxl_ref.training.sharded import ShardedRun
from sdxl_ref.training.state import SHARDS, SHARDS_FACTS
from sdxl_ref.weights.checkpoint import Checkpoint

STOP_AT = "STOP_AT"  # environment: the number of the batch at which the second process is told to stop


def bytes_of(tensors: Sequence[Any]) -> int:
    """The memory of what this process holds of tensors, shards or not."""
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def gathered_bytes(unet: nn.Module) -> int:
    """The memory of all weights that are whole now."""
    return bytes_of([p for p in unet.parameters() if not hasattr(p, "full_tensor")])


def counting(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return counted


def watched_command(words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """`sdxl-ref train --sharded` in a process of its own; what it held lies in a JSON file beside its output."""
    facts: Counter[str] = Counter()
    clip = ShardedRun._clip
    start = ShardedRun.__init__
    load = Checkpoint.load
    step_loss = finetune.FineTuning.__call__

    def watch(self: ShardedRun, unet: nn.Module, *args: Any) -> None:
        start(self, unet, *args)

        def note_gathered(*_: object) -> None:
            facts["gathered"] = max(facts["gathered"], gathered_bytes(unet))

        for unit in units(unet).values():
            unit.register_forward_hook(note_gathered)
            unit.register_full_backward_hook(note_gathered)

    def note_held(self: ShardedRun) -> float:
        norm = clip(self)
        facts["weights"] = bytes_of(list(self.weights.values()))
        facts["gradients"] = bytes_of([p.grad for p in self.weights.values()])
        facts["averaged"] = bytes_of(list(self.averaged.values()))
        moments = [self.optimizer.state[p][moment] for p in self.optimizer.state for moment in MOMENTS]
        facts["moments"] = bytes_of(moments)
        return norm

    def stopping(self: finetune.FineTuning, step: int, generator: torch.Generator) -> Tensor:
        facts["batches"] += 1
        if str(facts["batches"]) == environment.get(STOP_AT) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step_loss(self, step, generator)

    def load_noting(self: Checkpoint, part: str, *args: Any) -> nn.Module:
        facts[f"loaded {part}"] += 1
        return load(self, part, *args)

    replacements: list[tuple[Any, str, Any]] = [
        (ShardedRun, "__init__", watch),
        (ShardedRun, "_clip", note_held),
        (Checkpoint, "load", load_noting),
        (finetune.FineTuning, "__call__", stopping),
        (data, "encode_picture", counting(facts, "pictures", data.encode_picture)),
        (data, "encode_text", counting(facts, "captions", data.encode_text)),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        run_command(words, environment, output)
    finally:
        output.with_suffix(".json").write_text(json.dumps(facts))


def facts_of(folder: Path) -> list[dict[str, int]]:
    """What each process noted, in the order of ranks."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def sharded_state(folder: Path) -> dict[str, Tensor]:
    """The state of a sharded run, put together: rows lie in the files in the order of the processes."""
    state: dict[str, Tensor] = {}
    for path in sorted((folder / SHARDS).glob("*.safetensors")):
        for name, rows in load_file(path).items():
            state[name] = torch.cat([state[name], rows]) if name in state else rows  # (…,c) and (n,c) -> (…+n,c)
    return state


def sharded_step(folder: Path) -> int:
    return int(json.loads((folder / SHARDS / SHARDS_FACTS).read_text())["step"])
