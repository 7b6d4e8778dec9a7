"""`sdxl-ref info`: what a checkpoint or a VAE's file is: parts, sizes, dtypes, extras, VAE."""

import argparse

from sdxl_ref.weights.report import describe


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", metavar="MODEL", help="file, folder, repository, pocket-base or pocket-refiner")
    p.add_argument("--variant", help="fp16: read files such as model.fp16.safetensors of a folder or a repository")
    p.add_argument("--check", action="store_true", help="read the whole file once: its sha256, and that all is finite")


def run(a: argparse.Namespace) -> None:
    print("\n".join(describe(a.checkpoint, a.variant, check=a.check).lines()))
