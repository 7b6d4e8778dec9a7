"""The options of `train`, and what they say."""

import argparse
from pathlib import Path

from sdxl_ref.commands.common import VARIANT, seed
from sdxl_ref.config import PREDICTIONS, InputError
from sdxl_ref.training.adapters import Choice
from sdxl_ref.training.diffusion import WEIGHTINGS, Objective
from sdxl_ref.training.loop import Settings

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
  in full, where one GPU cannot hold weights, gradients and moments: each of 8 keeps an eighth
            torchrun --nproc-per-node 8 -m sdxl_ref train --checkpoint … --data DATA --out OUT --full --sharded

A run that was stopped (Ctrl-C, a kill, a lost process) goes on when the same command is given again. One with --sharded
does so with any number of processes, if a step has as many pictures as before (--batch-size times processes).
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
    p.add_argument(
        "--sharded", action="store_true", help="of --full: each process keeps its share of weights, gradients, moments"
    )
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


def training_seed(text: str) -> int:
    """A number that a generator takes. None is drawn: by it a stopped run goes on, and processes agree."""
    if text.strip() == "-1":
        raise argparse.ArgumentTypeError("training needs a seed that stays: give a number from 0 on")
    return seed(text)


def check(a: argparse.Namespace) -> tuple[Choice | None, Settings]:
    """What the options say, or InputError, before anything is read."""
    for name in ("rank", "alpha", "layers", "convolutions", "text_encoders"):
        if a.full and getattr(a, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is a LoRA's: leave it out, or leave --full out")
    if a.sharded and not a.full:
        raise InputError("--sharded is of --full, as a LoRA's moments fit on each device: leave it out, or add --full")
    if a.sharded and a.autocast and not a.gradient_checkpointing:
        remedy = "add --gradient-checkpointing, or leave --autocast out"
        raise InputError(f"--sharded --autocast keeps the whole UNet in bfloat16 for the backward pass: {remedy}")
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


def objective(a: argparse.Namespace, kind: str, prediction: str) -> Objective:
    """The objective of a "base" or "refiner" that predicts "epsilon" or "v". InputError for options out of range."""
    first, last = a.timesteps or (0, 199 if kind == "refiner" else 999)
    return Objective(first, last, a.drop_captions, a.weighting, prediction)
