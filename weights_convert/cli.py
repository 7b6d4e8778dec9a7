"""The command line. Exit status 0 on success, 2 with one line for bad input, 1 where a check does not hold."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sdxl_ref.config import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        a = parser().parse_args(argv)
        return int(a.run(a))
    except InputError as error:
        print(f"weights-convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("weights-convert: stopped; nothing is at the target that was not there before", file=sys.stderr)
        return 1


def parser() -> Parser:
    top = Parser(prog="weights-convert", description="SDXL weights: look into them, move them between layouts.")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    p = commands.add_parser("inspect", help="what a file or folder is: parts, sizes, dtypes, extras, VAE")
    p.add_argument("path", type=Path, metavar="FILE|FOLDER")
    common(p, inspect)

    p = commands.add_parser("convert", help="write the other layout, bit for bit")
    p.add_argument("source", type=Path, metavar="SRC")
    p.add_argument("target", type=Path, metavar="DST")
    p.add_argument("--to", required=True, choices=("official", "diffusers"))
    p.add_argument("--vae", type=Path, metavar="FILE", help="put this autoencoder in place of the source's")
    p.add_argument("--openclip", type=Path, metavar="FILE", help="put open_clip's own bigG text tower in place")
    p.add_argument("--force", action="store_true", help="replace what is at the target")
    common(p, convert)

    p = commands.add_parser("verify", help="keys, shapes, hashes, finite values; status 1 where one does not hold")
    p.add_argument("path", type=Path, metavar="FILE|FOLDER")
    common(p, verify)

    p = commands.add_parser("diff", help="compare two, tensor by tensor, across layouts; status 1 where they differ")
    p.add_argument("first", type=Path, metavar="A")
    p.add_argument("second", type=Path, metavar="B")
    common(p, diff)

    adapters = commands.add_parser("lora", help="adapters: merge, extract, convert").add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser
    )
    p = adapters.add_parser("merge", help="add adapters to a checkpoint's weights")
    p.add_argument("source", type=Path, metavar="CHECKPOINT")
    p.add_argument("adapters", nargs="+", metavar="LORA[:SCALE]")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    p.add_argument("--force", action="store_true", help="replace what is at the target")
    p.set_defaults(run=lora_merge)
    p = adapters.add_parser("extract", help="the adapter that takes one checkpoint to another")
    p.add_argument("first", type=Path, metavar="ORIGINAL")
    p.add_argument("second", type=Path, metavar="CHANGED")
    p.add_argument("--rank", type=int, required=True)
    form(p)
    p.set_defaults(run=lora_extract)
    p = adapters.add_parser("convert", help="write an adapter in another form")
    p.add_argument("source", type=Path, metavar="LORA")
    p.add_argument("--model", type=Path, required=True, metavar="CHECKPOINT", help="the model it is for")
    form(p)
    p.set_defaults(run=lora_convert)
    return top


def common(p: argparse.ArgumentParser, run: Any) -> None:
    p.add_argument("--variant", help="of a folder's files: fp16 for names such as model.fp16.safetensors")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def form(p: argparse.ArgumentParser) -> None:
    p.add_argument("--form", default="kohya", help="kohya, peft (diffusers' names) or official")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    p.add_argument("--force", action="store_true", help="replace what is at the target")


def as_json(found: object) -> str:
    """With null for what JSON has no number for: NaN and infinity."""
    return json.dumps(json.loads(json.dumps(found), parse_constant=lambda _: None), indent=1)


def inspect(a: argparse.Namespace) -> int:
    from weights_convert.reports import inspect as report

    found = report(a.path, a.variant)
    if a.json:
        print(as_json(found))
        return 0
    print(f"{found['path']}: {found['model']}")
    if found["note"]:
        print(f"note: {found['note']}")
    rows = [("part", "tensors", "parameters", "dtypes")]
    rows += [(k, str(v["tensors"]), f"{v['parameters']:,}", ", ".join(v["dtypes"])) for k, v in found["parts"].items()]
    table(rows)
    print(f"extras: {', '.join(found['extras']) or 'none'}")
    print(f"VAE: {found['vae']}")
    for key, value in found["metadata"].items():
        print(f"{key}: {value}")
    return 0


def convert(a: argparse.Namespace) -> int:
    from weights_convert.convert import convert as run

    report = run(a.source, a.target, a.to, force=a.force, variant=a.variant, vae=a.vae, openclip=a.openclip)
    print(as_json(report.lines) if a.json else report)
    return 0


def verify(a: argparse.Namespace) -> int:
    from weights_convert.reports import verify as checks

    found = checks(a.path, a.variant)
    if a.json:
        print(as_json([vars(each) for each in found]))
    else:
        table([("check", "holds", "found"), *((v.check, "yes" if v.holds else "NO", v.found) for v in found)])
    return 0 if all(each.holds for each in found) else 1


def diff(a: argparse.Namespace) -> int:
    from weights_convert.reports import diff as compare

    found = compare(a.first, a.second, a.variant)
    lists = ("only in the first", "only in the second", "of another shape", "of another dtype")
    if a.json:
        print(as_json(found))
    else:
        print(f"{found['equal']} tensors are equal, {len(found['different'])} differ")
        for name in lists:
            if found[name]:
                print(f"{len(found[name])} {name}: {', '.join(found[name][:5])}{', …' * (len(found[name]) > 5)}")
        rows = [(each["key"], f"{each['largest']:.3g}", f"{each['relative']:.3g}") for each in found["different"][:40]]
        if rows:
            table([("tensor", "largest", "relative"), *rows])
    return 1 if found["different"] or any(found[name] for name in lists) else 0


def table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def lora_merge(a: argparse.Namespace) -> int:
    from sdxl_ref.lora import path_and_scale
    from weights_convert.adapters import merge

    print(merge(a.source, [path_and_scale(each) for each in a.adapters], a.out, a.force))
    return 0


def lora_extract(a: argparse.Namespace) -> int:
    from weights_convert.adapters import extract

    print(extract(a.first, a.second, a.out, a.rank, a.form, a.force))
    return 0


def lora_convert(a: argparse.Namespace) -> int:
    from weights_convert.adapters import convert_adapter

    print(convert_adapter(a.source, a.model, a.out, a.form, a.force))
    return 0
