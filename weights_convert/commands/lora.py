"""`weights-convert lora`: adapters: merge, extract, convert."""

import argparse
from pathlib import Path

import torch

from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.cli import Help
from sdxl_ref.commands.adapter_options import path_and_scale
from sdxl_ref.commands.common import adapter_files, check_writable
from weights_convert.adapters import convert_adapter, extract, merge
from weights_convert.commands.common import add_target_option
from weights_convert.targets import check_suffix

DTYPES = ("float32", "bfloat16", "float16")


def arguments(p: argparse.ArgumentParser) -> None:
    commands = p.add_subparsers(required=True, metavar="COMMAND", parser_class=type(p))
    add_merge(add_command(commands, "merge", "add adapters to a checkpoint's weights"))
    add_extract(add_command(commands, "extract", "the adapter that takes one checkpoint to another"))
    add_convert(add_command(commands, "convert", "write an adapter in another form"))


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=summary, description=summary, formatter_class=Help)
    p.set_defaults(parser=p)
    return p


def add_merge(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="CHECKPOINT")
    p.add_argument("adapters", nargs="+", metavar="LORA[:SCALE]")
    p.add_argument("--dtype", choices=DTYPES, help="of every weight; otherwise each stays in its own")
    add_target_option(p)
    p.set_defaults(work=run_merge)


def run_merge(a: argparse.Namespace) -> None:
    check_writable(a.out, read=[a.source, *adapter_files(a.adapters)])
    check_suffix(a.out)
    dtype = getattr(torch, a.dtype) if a.dtype else None
    print(merge(a.source, [path_and_scale(text) for text in a.adapters], a.out, a.force, dtype))


def add_extract(p: argparse.ArgumentParser) -> None:
    p.add_argument("first", type=Path, metavar="ORIGINAL")
    p.add_argument("second", type=Path, metavar="CHANGED")
    p.add_argument("--rank", type=int, required=True, help="of the adapter; a higher one loses less")
    add_form_option(p)
    add_target_option(p)
    p.set_defaults(work=run_extract)


def run_extract(a: argparse.Namespace) -> None:
    check_writable(a.out, read=[a.first, a.second])
    check_suffix(a.out)
    print(extract(a.first, a.second, a.out, a.rank, a.form, a.force))


def add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="LORA")
    p.add_argument("--model", type=Path, required=True, metavar="CHECKPOINT", help="the model it is for")
    add_form_option(p)
    add_target_option(p)
    p.set_defaults(work=run_convert)


def run_convert(a: argparse.Namespace) -> None:
    check_writable(a.out, read=[a.source, a.model])
    check_suffix(a.out)
    print(convert_adapter(a.source, a.model, a.out, a.form, a.force))


def add_form_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--form", default="kohya", choices=tuple(FORMS), help="whose names its layers get")


def run(a: argparse.Namespace) -> int:
    a.work(a)
    return 0
