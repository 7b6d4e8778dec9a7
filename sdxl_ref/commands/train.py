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

from sdxl_ref.commands.common import VARIANT, pick_device, seed
from sdxl_ref.commands.kept import check_apart
from sdxl_ref.config import PREDICTIONS, SDXL, InputError
from sdxl_ref.training.adapters import Choice, attach, chosen
from sdxl_ref.training.cache import fingerprint
from sdxl_ref.training.data import Dataset
from sdxl_ref.training.diffusion import WEIGHTINGS, Objective, checkpoint_activations
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
from sdxl_ref.training.state import LOG, STATE, check_same, read_log
from sdxl_ref.weights.checkpoint import CONFIG_KEY, PREDICTION_KEYS, Checkpoint, build_empty, prefixes
from sdxl_ref.weights.identity import name_of
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.stated_config import config_to_json

EPILOG = """DATA is a folder of pictures with a file metadata.jsonl, one line for each picture:

  {"file_name": "cup.png", "text": "a cup of coffee in the style of sks"}
  {"file_name": "barn.jpg", "text": "a red barn in the style of sks", "aesthetic_score": 6.5}

or without that file, where each picture has its caption in a text file beside it: cup.png and cup.txt (or cup.caption),
as kohya's tools have them.

examples:
  LoRA:     sdxl-ref train --checkpoint sd_xl_refiner_1.0.safetensors --data DATA --out OUT
  its use:  sdxl-ref refine photo.png --prompt P --checkpoint sd_xl_refiner_1.0.safetensors \\
                --lora OUT/lora_kohya.safetensors
  in full:  sdxl-ref train --checkpoint sd_xl_base_1.0.safetensors --data DATA --out OUT --full --learning-rate 1e-5
  two GPUs: torchrun --nproc-per-node 2 -m sdxl_ref train --checkpoint … --data DATA --out OUT

A run that was stopped (Ctrl-C, a kill, a lost process) goes on when the same command is given again.
"""
MOST = {"batch_size": 10_000, "accumulate": 1_000_000, "save_every": 1_000_000_000}


def arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = EPILOG
    p.add_argument("--checkpoint", required=True, metavar="MODEL", help="file, folder, repository, or pocket-refiner")
    p.add_argument("--data", type=Path, required=True, metavar="DATA", help="pictures and their captions, see below")
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
    p.add_argument("--variant", help=VARIANT)
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the UNet returns, in place of what the file says")
    p.add_argument("--weighting", default="uniform", choices=tuple(WEIGHTINGS), help="of the loss by noise level")
    p.add_argument("--drop-captions", type=float, default=0.1, help="share of captions that are dropped, for guidance")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"), help="of the weights")
    p.add_argument("--autocast", action="store_true", help="products of matrices in bfloat16 although weights are not")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    p.add_argument("--skip-bad", action="store_true", help="leave damaged pictures out instead of stopping")
    p.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    p.add_argument("--seed", type=training_seed, default=0, help="of everything that is drawn")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, …")


@dataclass(frozen=True)
class Plan:
    """What is trained how."""

    checkpoint: Checkpoint
    choice: Choice | None  # which layers get a LoRA; None: the UNet learns in full
    settings: Settings
    objective: Objective


def training_seed(text: str) -> int:
    """A number that a generator takes. None is drawn: by it a stopped run goes on, and processes agree."""
    if text.strip() == "-1":
        raise argparse.ArgumentTypeError("training needs a seed that stays: give a number from 0 on")
    return seed(text)


def run(a: argparse.Namespace) -> None:
    choice, settings = check(a)
    with process_group(pick_device(a.device)) as device:
        process = this_process()
        try:
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


def check(a: argparse.Namespace) -> tuple[Choice | None, Settings]:
    """What the options say, or InputError, before anything is read."""
    for name in ("rank", "alpha", "layers", "convolutions", "text_encoders"):
        if a.full and getattr(a, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is a LoRA's: leave it out, or leave --full out")
    for name, most in MOST.items():
        if not 1 <= getattr(a, name) <= most:
            raise InputError(f"--{name.replace('_', '-')} must be from 1 to {most}, found {getattr(a, name)}")
    choice = None
    if not a.full:
        options = {name: getattr(a, name) for name in ("rank", "alpha", "layers") if getattr(a, name) is not None}
        choice = Choice(**options, convolutions=a.convolutions, text_encoders=a.text_encoders)
    usual_rate = 1e-5 if a.full else 1e-4
    settings = Settings(
        steps=a.steps,
        learning_rate=usual_rate if a.learning_rate is None else a.learning_rate,
        warm_up=a.warm_up,
        weight_decay=a.weight_decay,
        ema=a.ema,
        autocast="bfloat16" if a.autocast else "",
        seed=a.seed,
        accumulate=a.accumulate,
    )
    objective(a, "refiner", "epsilon")
    return choice, settings


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


def objective(a: argparse.Namespace, kind: str, prediction: str) -> Objective:
    """The objective of a "base" or "refiner" that predicts "epsilon" or "v". InputError for options out of range."""
    first, last = a.timesteps or (0, 199 if kind == "refiner" else 999)
    return Objective(first, last, a.drop_captions, a.weighting, prediction)


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
    if not check_same(a.out, run_identity, partly=True) and results:
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
    towers = {
        part: checkpoint.load(part, dtype, device) for part in prefixes(config) if part.startswith("text_encoder")
    }
    report(*(f"note: {note}" for note in examples.notes))
    data = dataset(a, checkpoint, towers, examples, device)
    parts = {"unet": checkpoint.load("unet", dtype, device)}
    torch.manual_seed(a.seed)
    if plan.choice and plan.choice.text_encoders:
        parts |= towers
    del towers  # where their outputs are cached, their memory is free
    if a.gradient_checkpointing:
        checkpoint_activations(parts["unet"])  # type: ignore[arg-type]
    factors = attach(parts, config, plan.choice) if plan.choice else None
    module = parts["unet"].requires_grad_(True) if factors is None else factors
    loss = FineTuningLoss(parts, plan.objective, data.dropped_text() if data.text_keys else None, factors)
    replicas = replicate(loss, some_unused=len(parts) > 1)
    step_loss = FineTuning(replicas or loss, data, plan.objective, a.batch_size)
    state = Run(module, plan.settings, a.out, run_identity | {"data": digest(data)}, replicas)
    if state.leads:
        data.clean()
    report(*introduction(a, plan, module, state.step))
    for _ in state.train(step_loss, a.save_every):
        pass
    if state.leads:
        if factors is None:
            paths = [write_checkpoint(a.out, checkpoint, parts["unet"], state.averaged)]
        else:
            paths = write_adapter(a.out, config, factors, state.averaged)
        report(f"wrote {', '.join(str(path) for path in paths)}")


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
