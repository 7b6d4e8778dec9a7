"""`weights-convert convert`: write the other layout, bit for bit."""

import argparse
from pathlib import Path

from sdxl_ref.weights.checkpoint import PARTS
from weights_convert.commands.common import add_force_option, add_reading_options, print_json
from weights_convert.convert import LAYOUTS, convert


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="SRC")
    p.add_argument("target", type=Path, metavar="DST")
    p.add_argument("--to", required=True, choices=LAYOUTS, help="one file in official names, or diffusers' folder")
    p.add_argument("--part", choices=PARTS, help="write this part of a whole model alone")
    p.add_argument("--vae", type=Path, metavar="FILE", help="put this autoencoder in place of the source's")
    p.add_argument("--openclip", type=Path, metavar="FILE", help="put this bigG text tower in place, as open_clip's")
    add_force_option(p)
    add_reading_options(p)


def run(a: argparse.Namespace) -> int:
    parts = {"vae": a.vae, "openclip": a.openclip, "part": a.part}
    report = convert(a.source, a.target, a.to, force=a.force, variant=a.variant, **parts)
    if a.json:
        print_json(report.lines)
    else:
        print(report)
    return 0
