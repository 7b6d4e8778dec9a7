"""`sdxl-ref train`: fine-tune a base or a refiner on a folder of captioned pictures, as a LoRA or in full."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from sdxl_ref.checkpoint import Checkpoint, build_empty, open_checkpoint, prefixes
from sdxl_ref.commands.common import pick_device, seed
from sdxl_ref.config import InputError
from sdxl_ref.hub import resolve
from sdxl_ref.training.adapters import Choice, attach, chosen
from sdxl_ref.training.data import Dataset, read_folder
from sdxl_ref.training.diffusion import WEIGHTINGS, Objective, checkpoint_activations
from sdxl_ref.training.finetune import (
    ADAPTERS,
    CHECKPOINT,
    FineTuning,
    Loss,
    fingerprint,
    place_in_world,
    replicated,
    write_adapter,
    write_checkpoint,
)
from sdxl_ref.training.loop import Run, Settings, check_same, locked

EPILOG = """DATA is a folder of pictures with a file metadata.jsonl, one line for each picture:

  {"file_name": "cup.png", "text": "a cup of coffee in the style of sks"}
  {"file_name": "barn.jpg", "text": "a red barn in the style of sks", "aesthetic_score": 6.5}

examples:
  LoRA:     sdxl-ref train --checkpoint sd_xl_refiner_1.0.safetensors --data DATA --out OUT
  its use:  sdxl-ref refine photo.png --prompt P --checkpoint sd_xl_refiner_1.0.safetensors \\
                --lora OUT/lora_kohya.safetensors
  in full:  sdxl-ref train --checkpoint sd_xl_base_1.0.safetensors --data DATA --out OUT --full --learning-rate 1e-5
  two GPUs: torchrun --nproc-per-node 2 -m sdxl_ref train --checkpoint … --data DATA --out OUT

A run that was stopped (Ctrl-C, a kill, a lost process) goes on when the same command is given again.
"""


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EPILOG
    p.add_argument("--checkpoint", required=True, metavar="MODEL", help="file, folder, repository, or pocket-refiner")
    p.add_argument("--data", type=Path, required=True, metavar="DATA", help="pictures and metadata.jsonl, see below")
    p.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="state, log, cache and result; made if need be"
    )
    p.add_argument("--full", action="store_true", help="the whole UNet learns, not a LoRA")
    p.add_argument("--rank", type=int, help="of the LoRA (16)")
    p.add_argument("--alpha", type=float, help="its weight is alpha / rank (the rank)")
    p.add_argument("--layers", metavar="REGEX", help='which layers get it, by name ("attn": those of attention)')
    p.add_argument("--convolutions", action="store_true", help="the UNet's convolutions too")
    p.add_argument("--text-encoders", action="store_true", help="layers of the text encoders too")
    p.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    p.add_argument("--batch-size", type=int, default=1, help="pictures at once, in each process")
    p.add_argument("--accumulate", type=int, default=1, help="batches for one step")
    p.add_argument("--learning-rate", type=float, help="at its highest (LoRA 1e-4, full 1e-5)")
    p.add_argument("--warm-up", type=int, default=50, help="steps over which the rate rises; then it falls as a cosine")
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument(
        "--ema", type=float, default=0.0, help="decay of averaged weights, which are then the result; 0: none"
    )
    p.add_argument("--timesteps", type=int, nargs=2, metavar=("FIRST", "LAST"), help="(refiner 0 199, base 0 999)")
    p.add_argument("--weighting", default="uniform", choices=tuple(WEIGHTINGS), help="of the loss by noise level")
    p.add_argument("--drop-captions", type=float, default=0.1, help="share of captions that are dropped, for guidance")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"), help="of the weights")
    p.add_argument("--autocast", action="store_true", help="products of matrices in bfloat16 although weights are not")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    p.add_argument("--skip-bad", action="store_true", help="leave damaged pictures out instead of stopping")
    p.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    p.add_argument("--seed", type=seed, default=0, help="of everything that is drawn")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, …")


def run(a: argparse.Namespace) -> None:
    choice, settings = check(a)
    with processes(a.device) as device:
        rank, world = place_in_world()
        try:
            checkpoint = open_checkpoint(resolve(a.checkpoint))
            about = identity(a, checkpoint, choice, settings)
            with alone_in(a.out):
                train(a, checkpoint, choice, settings, about, device)
        except InputError:
            if rank:  # the first process tells of it
                raise SystemExit(2) from None
            raise
        except (RuntimeError, ConnectionError) as error:
            lost = isinstance(error, (ConnectionError, distributed.DistError)) or "gloo" in str(error)
            if world == 1 or not lost:
                raise
            state = "start it again with the same command: it goes on from the last saved state"
            print(f"sdxl-ref: error: another process of this run ended; {state}", file=sys.stderr)
            raise SystemExit(1) from error


def check(a: argparse.Namespace) -> tuple[Choice | None, Settings]:
    """What the options say, or InputError, before anything is read."""
    for name in ("rank", "alpha", "layers", "convolutions", "text_encoders"):
        if a.full and getattr(a, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is a LoRA's: leave it out, or leave --full out")
    for name in ("batch_size", "save_every"):
        if getattr(a, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(a, name)}")
    given = {name: getattr(a, name) for name in ("rank", "alpha", "layers") if getattr(a, name) is not None}
    choice = None if a.full else Choice(**given, convolutions=a.convolutions, text_encoders=a.text_encoders)
    rate = (1e-5 if a.full else 1e-4) if a.learning_rate is None else a.learning_rate
    settings = Settings(
        steps=a.steps,
        learning_rate=rate,
        warm_up=a.warm_up,
        weight_decay=a.weight_decay,
        ema=a.ema,
        autocast="bfloat16" if a.autocast else "",
        seed=a.seed,
        accumulate=a.accumulate,
    )
    objective(a, "refiner")
    return choice, settings


def objective(a: argparse.Namespace, kind: str) -> Objective:
    first, last = a.timesteps or (0, 199 if kind == "refiner" else 999)
    return Objective(first, last, a.drop_captions, a.weighting)


@contextmanager
def processes(name: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if it did; the device of this one."""
    device = pick_device(name)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield device
        return
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise InputError(f"expected torchrun's variables, found no {', '.join(missing)}: use it, or unset WORLD_SIZE")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does what follows while the others wait; then they do. Where it fails, they end."""
    rank, world = place_in_world()
    done = [False]
    if rank:
        distributed.broadcast_object_list(done)
        if not done[0]:
            raise InputError("the first process failed")
    try:
        yield
        done = [True]
    finally:
        if world > 1 and rank == 0:
            distributed.broadcast_object_list(done)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other run works in a folder meanwhile: the first process holds it for all. InputError where one does."""
    with ExitStack() as held:
        with first_alone():
            if place_in_world()[0] == 0:
                held.enter_context(locked(folder))
        yield


def say(*lines: str) -> None:
    if place_in_world()[0] == 0:
        for line in lines:
            print(line, flush=True)


def identity(
    a: argparse.Namespace, checkpoint: Checkpoint, choice: Choice | None, settings: Settings
) -> dict[str, object]:
    """What is trained how, data aside. InputError where --out or the layers forbid it, before hours of encoding."""
    if a.full and (a.out / CHECKPOINT).exists() and (a.out / CHECKPOINT).samefile(checkpoint.path):
        raise InputError(f"the result would replace the checkpoint, {checkpoint.path}: choose another --out")
    about: dict[str, object] = {
        "settings": asdict(settings),
        "checkpoint": checkpoint.sha256(),
        "lora": asdict(choice) if choice else None,
        "objective": asdict(objective(a, checkpoint.config.kind)),
        "pictures of a step": a.batch_size * place_in_world()[1],
        "dtype": a.dtype,
    }
    results = [path for name in (CHECKPOINT, *ADAPTERS.values()) if (path := a.out / name).exists()]
    if not check_same(a.out, about, partly=True) and results:
        where = f"found {results[0]}, but no state of the run that wrote it"
        raise InputError(f"{where}: move it, or choose another --out")
    if choice:
        parts = {part: build_empty(part, checkpoint.config) for part in prefixes(checkpoint.config) if part != "vae"}
        chosen(parts, checkpoint.config, choice)
    return about


def train(
    a: argparse.Namespace,
    checkpoint: Checkpoint,
    choice: Choice | None,
    settings: Settings,
    about: dict[str, object],
    device: torch.device,
) -> None:
    config, dtype = checkpoint.config, getattr(torch, a.dtype)
    aim = objective(a, config.kind)
    say(f"{checkpoint.path.name}: {checkpoint.name}, {a.dtype} on {device}")
    towers = {
        part: checkpoint.load(part, dtype, device) for part in prefixes(config) if part.startswith("text_encoder")
    }
    data = dataset(a, checkpoint, towers, device)
    unet = checkpoint.load("unet", dtype, device)
    torch.manual_seed(a.seed)
    parts = {"unet": unet} | (towers if choice and choice.text_encoders else {})
    del towers  # where their outputs are cached, their memory is free
    factors = attach(parts, config, choice) if choice else None
    if a.gradient_checkpointing:
        checkpoint_activations(unet)  # type: ignore[arg-type]
    module = unet.requires_grad_(True) if factors is None else factors
    parameters = sum(p.numel() for p in module.parameters())
    what = "the whole UNet" if factors is None else f"a LoRA of rank {choice.rank} on {len(factors)} layers"  # type: ignore[union-attr]
    loss = Loss(config, parts, aim, data.empty() if data.text_keys else None, factors)
    wrapped = replicated(loss, some_unused=len(parts) > 1)
    work = FineTuning(wrapped or loss, data, aim, a.batch_size)
    state = Run(module, settings, a.out, about | {"data": digest(data)}, wrapped)
    if state.leads:
        data.clean()
    plan = f"{settings.steps} steps of {a.batch_size * settings.accumulate * place_in_world()[1]} pictures"
    say(f"training {what}: {parameters:,} parameters", f"plan: {plan}, t in {aim.first}..{aim.last}")
    if a.full and dtype == torch.bfloat16:
        say("note: steps below 1/512 of a weight are lost in bfloat16, most of a training's: use float32, --autocast")
    if state.step:
        say(f"going on from step {state.step}")
    for _ in state.train(work, a.save_every):
        pass
    if state.leads:
        paths = [write_checkpoint(a.out, checkpoint, unet, state)] if factors is None else []
        paths += write_adapter(a.out, config, factors, state) if factors is not None else []
        say(f"wrote {', '.join(str(path) for path in paths)}")


def dataset(
    a: argparse.Namespace, checkpoint: Checkpoint, towers: Mapping[str, nn.Module], device: torch.device
) -> Dataset:
    """The pictures, with what VAE and text encoders make of them: computed by the first process, read by all."""
    examples = read_folder(a.data)
    vae = checkpoint.load("vae", torch.float32, device)
    parts = {"vae": vae, **towers}
    fingerprints = {name: fingerprint(part) for name, part in parts.items()}
    where = a.out / "cache", checkpoint.config
    with first_alone():
        data = Dataset(examples, *where, parts, fingerprints, cache_text=not a.text_encoders, skip_bad=a.skip_bad)
    sizes = ", ".join(f"{height}x{width}: {n}" for (height, width), n in sorted(Counter(data.sizes).items()))
    say(*data.notes, f"{len(data)} pictures by size (height x width): {sizes}")
    return data


def digest(data: Dataset) -> str:
    """Of everything that a run learns from."""
    rows = [data.latent_keys, dict(data.text_keys), [example.text for example in data.examples], data.numbers.tolist()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
