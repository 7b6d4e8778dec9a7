"""`sdxl-ref info`: what a file is: a model, a part of one or an adapter; sizes, dtypes, extras."""

import argparse
from contextlib import suppress

from sdxl_ref.adapters.report import describe_any


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", metavar="MODEL", help="file, folder, repository, pocket-base or pocket-refiner")
    p.add_argument("--variant", help="fp16: read files such as model.fp16.safetensors of a folder or a repository")
    p.add_argument("--check", action="store_true", help="read the whole file once: its sha256, and that all is finite")


def run(a: argparse.Namespace) -> None:
    lines = describe_any(a.checkpoint, a.variant, check=a.check).lines()
    with suppress(BrokenPipeError):  # who reads may have seen enough
        print("\n".join(lines))
