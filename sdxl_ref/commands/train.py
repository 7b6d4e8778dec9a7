"""`sdxl-ref train`: fine-tune a base or a refiner on a folder of captioned pictures, as a LoRA or in full."""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sdxl_ref.commands.common import pick_device
from sdxl_ref.commands.kept import check_apart
from sdxl_ref.commands.train_options import arguments as arguments
from sdxl_ref.commands.train_options import check, objective
from sdxl_ref.config import SDXL, InputError
from sdxl_ref.training.adapters import Choice, attach, chosen
from sdxl_ref.training.cache import fingerprint
from sdxl_ref.training.data import Dataset
from sdxl_ref.training.diffusion import Objective, checkpoint_activations
from sdxl_ref.training.examples import Examples
from sdxl_ref.training.finetune import FineTuning, FineTuningLoss
from sdxl_ref.training.image_folder import read_folder
from sdxl_ref.training.loop import Run, Settings
from sdxl_ref.training.processes import (
    first_alone,
    is_lost_process,
    locked_for_all,
    process_group,
    replicate,
    report,
    this_process,
)
from sdxl_ref.training.results import ADAPTERS, CHECKPOINT, write_adapter, write_checkpoint
from sdxl_ref.training.shard_plan import memory_plan
from sdxl_ref.training.state import LOG, SHARDS, STATE, check_same, read_log
from sdxl_ref.weights.checkpoint import CONFIG_KEY, PREDICTION_KEYS, Checkpoint, build_empty, prefixes
from sdxl_ref.weights.identity import name_of
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.stated_config import config_to_json


@dataclass(frozen=True)
class Plan:
    """What is trained how."""

    checkpoint: Checkpoint
    choice: Choice | None  # which layers get a LoRA; None: the UNet learns in full
    settings: Settings
    objective: Objective


def run(a: argparse.Namespace) -> None:
    choice, settings = check(a)
    with process_group(pick_device(a.device), is_needed=a.sharded) as device:
        process = this_process()
        try:
            if a.sharded:
                check_sharded(device)
                with first_alone():
                    clear(a.out)  # a kill may have left the state under another name
            examples = read_folder(a.data)
            checkpoint = open_model(a.checkpoint, a.variant, a.prediction)
            check_out(a, checkpoint, examples)
            plan = Plan(
                checkpoint, choice, settings, objective(a, checkpoint.config.kind, checkpoint.config.prediction)
            )
            run_identity = identity(a, plan)
            with locked_for_all(a.out):
                train(a, plan, run_identity, examples, device)
        except InputError:
            if not process.leads:  # the first process reports it
                raise SystemExit(2) from None
            raise
        except (RuntimeError, ConnectionError) as error:
            if process.count == 1 or not is_lost_process(error):
                raise
            remedy = "start it again with the same command: it goes on from the last saved state"
            print(f"sdxl-ref: error: another process of this run ended; {remedy}", file=sys.stderr)
            raise SystemExit(1) from error


def check_sharded(device: torch.device) -> None:
    """InputError where `--sharded` cannot run."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"expected --device cpu or cuda with --sharded, found {device.type}")
    try:
        from sdxl_ref.training import sharded  # noqa: F401
    except ImportError as error:
        raise InputError(f"--sharded needs torch 2.8 or newer, found {torch.__version__}: update it") from error


def open_model(name: str, variant: str | None, prediction: str | None) -> Checkpoint:
    """Open the model to train; with a prediction, as if its file said that this is what the UNet returns.

    What a marker or a folder's settings say of it is said by the metadata then, which the result takes over.
    """
    checkpoint = open_checkpoint(name, variant=variant)
    prediction = prediction or checkpoint.config.prediction
    if prediction == "epsilon" == checkpoint.config.prediction:
        return checkpoint
    config = replace(checkpoint.config, prediction=prediction)
    says = {CONFIG_KEY: config_to_json(config), PREDICTION_KEYS[0]: prediction}
    return replace(checkpoint, config=config, metadata={**checkpoint.metadata, **says})


def check_out(a: argparse.Namespace, checkpoint: Checkpoint, examples: Examples) -> None:
    """InputError where --out is the model's folder, or would have what is read written."""
    out = Path(os.path.realpath(a.out))
    if os.path.isdir(a.checkpoint):
        model = Path(os.path.realpath(a.checkpoint))
        if out == model or (checkpoint.path.is_dir() and model in out.parents):
            raise InputError(f"expected --out apart from the model's folder {a.checkpoint}, found {a.out}")
    targets = [a.out / name for name in (STATE, LOG, CHECKPOINT, *ADAPTERS.values())]
    for source in (checkpoint.path, *examples.files, *{example.path for example in examples.examples}):
        check_apart(targets, source)


def identity(a: argparse.Namespace, plan: Plan) -> dict[str, object]:
    """What is trained how, data aside. InputError where --out or the layers forbid it, before hours of encoding."""
    checkpoint = plan.checkpoint
    run_identity: dict[str, object] = {
        "settings": asdict(plan.settings),
        "checkpoint": checkpoint.sha256(),
        "lora": asdict(plan.choice) if plan.choice else None,
        "objective": plan.objective.identity,
        "pictures of a step": a.batch_size * this_process().count,
        "dtype": a.dtype,
    }
    results = [a.out / name for name in (CHECKPOINT, *ADAPTERS.values()) if (a.out / name).exists()]
    if read_log(a.out):
        results.append(a.out / LOG)
    state_name = SHARDS if a.sharded else STATE
    if not check_same(a.out, run_identity, partly=True, name=state_name) and results:
        problem = f"found {results[0]}, but no state of the run that wrote it"
        raise InputError(f"{problem}: move it, or choose another --out")
    if plan.choice:
        config = checkpoint.config
        empty_parts = {part: build_empty(part, config) for part in prefixes(config) if part != "vae"}
        chosen(empty_parts, config, plan.choice)
    return run_identity


def train(
    a: argparse.Namespace, plan: Plan, run_identity: dict[str, object], examples: Examples, device: torch.device
) -> None:
    """Train, and write the result."""
    checkpoint = plan.checkpoint
    config = checkpoint.config
    dtype = getattr(torch, a.dtype)
    report(f"{checkpoint.path.name}: {name_of(checkpoint)}, {a.dtype} on {device}")
    if checkpoint.note:
        report(f"note: {checkpoint.note}")
    if a.full and checkpoint.defaults != SDXL:
        report("note: the result keeps how the model is run in its metadata, where sdxl-ref reads it")
    if a.sharded:
        report(memory_plan(config, this_process().count, dtype, bool(a.ema)).line())
    towers = {
        part: checkpoint.load(part, dtype, device) for part in prefixes(config) if part.startswith("text_encoder")
    }
    report(*(f"note: {note}" for note in examples.notes))
    data = dataset(a, checkpoint, towers, examples, device)
    if not (plan.choice and plan.choice.text_encoders):
        towers = {}  # their outputs are cached, and their memory is free
    parts = {"unet": load_unet(a, checkpoint, dtype, device), **towers}
    torch.manual_seed(a.seed)
    factors = attach(parts, config, plan.choice) if plan.choice else None
    module = parts["unet"].requires_grad_(True) if factors is None else factors
    loss = FineTuningLoss(parts, plan.objective, data.dropped_text() if data.text_keys else None, factors)
    replicas = None if a.sharded else replicate(loss, some_unused=len(parts) > 1)
    step_loss = FineTuning(replicas or loss, data, plan.objective, a.batch_size)
    state = run_class(a)(module, plan.settings, a.out, run_identity | {"data": digest(data)}, replicas)
    if state.leads:
        data.clean()
    report(*introduction(a, plan, module, state.step))
    for _ in state.train(step_loss, a.save_every):
        pass
    paths: list[Path] = []
    if factors is None and (state.leads or a.sharded):  # shards are gathered by all
        paths = [write_checkpoint(a.out, checkpoint, parts["unet"], state.averages())]
    elif factors is not None and state.leads:
        paths = write_adapter(a.out, config, factors, state.averaged)
    report(f"wrote {', '.join(str(path) for path in paths)}")


def load_unet(a: argparse.Namespace, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network to train, or this process's shards of it."""
    if a.sharded:
        from sdxl_ref.training.sharded import load_shards

        return load_shards(checkpoint, dtype, device, a.gradient_checkpointing)
    unet = checkpoint.load("unet", dtype, device)
    if a.gradient_checkpointing:
        checkpoint_activations(unet)  # type: ignore[arg-type]
    return unet


def run_class(a: argparse.Namespace) -> type[Run]:
    """What trains it."""
    if a.sharded:
        from sdxl_ref.training.sharded import ShardedRun

        return ShardedRun
    return Run


def dataset(
    a: argparse.Namespace,
    checkpoint: Checkpoint,
    towers: Mapping[str, nn.Module],
    examples: Examples,
    device: torch.device,
) -> Dataset:
    """The pictures, with what VAE and text encoders make of them: computed by the first process, read by all."""
    parts = {"vae": checkpoint.load("vae", torch.float32, device), **towers}
    fingerprints = {name: fingerprint(part) for name, part in parts.items()}
    with first_alone():
        data = Dataset(
            examples.examples,
            a.out / "cache",
            checkpoint.config,
            parts,
            fingerprints,
            cache_text=not a.text_encoders,
            skip_bad=a.skip_bad,
        )
    sizes = [f"{height}x{width}: {count}" for (height, width), count in sorted(Counter(data.sizes).items())]
    report(*data.notes, f"{len(data)} pictures by size (height x width): {', '.join(sizes)}")
    return data


def introduction(a: argparse.Namespace, plan: Plan, module: nn.Module, step: int) -> list[str]:
    """What a run says before its first step; `step` is that from which it is resumed, 0 for a new one."""
    subject = "the whole UNet"
    if plan.choice:
        subject = f"a LoRA of rank {plan.choice.rank} on {len(list(module.children()))} layers"
    count = sum(p.numel() for p in module.parameters())
    pictures = a.batch_size * plan.settings.accumulate * this_process().count
    timesteps = f"t in {plan.objective.first}..{plan.objective.last}"
    lines = [f"training {subject}: {count:,} parameters"]
    lines.append(f"plan: {plan.settings.steps} steps of {pictures} pictures, {timesteps}")
    if plan.choice is None and a.dtype == "bfloat16":
        lines.append(
            "note: steps below 1/512 of a weight are lost in bfloat16, most of a training's: use float32, --autocast"
        )
    if step:
        lines.append(f"going on from step {step}")
    return lines


def digest(data: Dataset) -> str:
    """The hash of everything that a run learns from."""
    captions = [example.text for example in data.examples]
    sources = [data.latent_keys, dict(data.text_keys), captions, data.numbers.tolist()]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()
