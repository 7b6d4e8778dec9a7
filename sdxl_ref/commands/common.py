"""What every command that makes pictures shares: its options, and the checks before the work."""

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdxl_ref import __version__
from sdxl_ref.checkpoint import Checkpoint
from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS


def sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompt", required=True, help="what the picture shows")
    p.add_argument("--negative-prompt", help="what to steer away from")
    p.add_argument("--steps", type=int, default=50, help="steps of the whole schedule")
    p.add_argument("--guidance-scale", type=float, default=5.0, help="1 or less: no guidance")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1; softens high guidance")
    p.add_argument("--sampler", default="euler", help=", ".join(SAMPLERS))
    p.add_argument("--spacing", default="leading", help="leading, trailing, linspace or sgm")
    p.add_argument("--karras", action="store_true", help="Karras sigmas between the ends of the spacing")
    p.add_argument("--seed", type=seed, default=0, help="of the noise; the same seed gives the same picture")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="VAE: always float32")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    p.add_argument("--watermark", action="store_true", help="put the official code's invisible one in")
    p.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="put an adapter on; repeatable")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="where the picture goes; replaced if it is there")
    p.add_argument("--save-latents", type=Path, metavar="FILE", help="also write the final latents, as safetensors")


def seed(text: str) -> int:
    """A number that a generator takes."""
    if not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from -2^63 to 2^64 - 1, found {text}")
    return int(text)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" has no values
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).split(". ")[0]  # some of PyTorch's go on for pages
        raise InputError(f"device {name!r} is not to be had: expected auto, cpu, cuda or mps ({why})") from error


def writable(*paths: Path | None, read: Sequence[object] = ()) -> None:
    """InputError unless files can be written there, on none that is read: found out before the work, not after it."""
    given = [path for path in paths if path is not None]
    places = [os.path.realpath(str(path)) for path in (*given, *read)]
    for i, path in enumerate(given):
        if places[i] in places[:i] + places[i + 1 :]:
            raise InputError(f"cannot write {path}: another file is read or written there: name another one")
        fits = len(os.fsencode(path.name)) <= 255 and (os.path.isfile(path) or not os.path.lexists(path))
        folder = os.path.dirname(places[i])  # of what a link points to
        if not (fits and os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise InputError(f"cannot write {path}: expected a file name in an existing, writable folder")


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a picture's settings say of what made it. Reads the file once, for its hash."""
    digest = checkpoint.sha256()
    weights = {"file": checkpoint.path.name, "sha256": digest, "vae": checkpoint.vae_name(digest)}
    return {"checkpoint": weights, "versions": {"sdxl_ref": __version__, "torch": torch.__version__}}


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc make tensors of freed memory, instead of the system's new pages each time: a tenth of a run at 512 px.

    Blocks of up to 256 MiB, for up to a fifth more memory. Other systems, and a glibc before 2.35, stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and device.type == "cpu" else None
    if mallopt and mallopt(-3, 1 << 28):  # M_MMAP_THRESHOLD: taken
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
