"""`sdxl-ref fetch`: download an official file from the hub, and check its hash."""

import argparse
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.fetching import REPOSITORIES, fetch


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model", choices=tuple(REPOSITORIES), help="which official file: 6.1 GB the refiner, 6.9 GB the base"
    )
    p.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where it goes; the current folder")
    p.add_argument("--revision", help="branch, tag or commit of the repository")


def run(a: argparse.Namespace) -> None:
    if not a.out.is_dir():
        raise InputError(f"expected an existing folder, found {a.out}")
    path, is_new = fetch(a.model, a.out, revision=a.revision)
    print(f"{path}{'' if is_new else ' is there already'}: sha256 is the official one")
