"""The command line. Exit status 0 on success, 2 with one line for bad input, 1 for anything else."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdxl_ref import __version__
from sdxl_ref.config import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdxl_ref.checkpoint import Checkpoint

MAX_PIXELS = 1024 * 1024  # the area SDXL was trained at; larger pictures are shrunk to it


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
    except InputError as error:
        print(f"sdxl-ref: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdxl-ref: stopped", file=sys.stderr)
        return 1
    return 0


def parser() -> Parser:
    top = Parser(prog="sdxl-ref", description="Stable Diffusion XL's refiner, and the system around it.")
    top.add_argument("--version", action="version", version=f"sdxl-ref {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    p = commands.add_parser("refine", help="refine a picture under a prompt", formatter_class=_Defaults)
    p.add_argument("image", help="a picture of any size and kind: shrunk to at most 1024x1024 pixels of area, then "
                   "cropped around its centre to sides that are multiples of 8")  # fmt: skip
    p.add_argument("--prompt", required=True)
    p.add_argument("--negative-prompt", default="", help="what to steer away from")
    p.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="safetensors, official layout")
    p.add_argument("--strength", type=float, default=0.3, help="share of the steps that run, above 0 and at most 1")
    p.add_argument("--strength-rule", default="exact", help='"exact", or "sgm" as the official code counts')
    p.add_argument("--aesthetic-score", type=float, default=6.0, help="of the picture wanted, about 1 to 10")
    p.add_argument("--negative-aesthetic-score", type=float, default=2.5, help="of the picture to steer away from")
    sampling(p)
    p.set_defaults(run=refine)

    p = commands.add_parser("info", help="tell what a checkpoint is", formatter_class=_Defaults)
    p.add_argument("checkpoint", type=Path, metavar="FILE")
    p.add_argument("--check", action="store_true", help="read the whole file once: its sha256, and that all is finite")
    p.set_defaults(run=info)
    return top


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def sampling(p: argparse.ArgumentParser) -> None:
    """The options of every command that makes pictures."""
    p.add_argument("--steps", type=int, default=50, help="steps of the whole schedule")
    p.add_argument("--guidance-scale", type=float, default=5.0, help="1 or less: no guidance")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1; softens high guidance")
    p.add_argument("--sampler", default="euler", help="euler or ddpm")
    p.add_argument("--spacing", default="leading", help="leading, trailing, linspace or sgm")
    p.add_argument("--karras", action="store_true", help="Karras sigmas between the ends of the spacing")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="VAE: always float32")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="where the picture goes (next to you, named after it)")
    p.add_argument("--save-latents", type=Path, metavar="FILE", help="also write the final latents, as safetensors")


def refine(a: argparse.Namespace) -> None:
    if not a.prompt.strip():
        warnings.warn("the prompt is empty", stacklevel=1)
    out = a.out or Path(f"{Path(a.image).stem}-refined.png")
    for path in filter(None, (out, a.save_latents)):
        writable(path)

    import torch
    from tqdm import tqdm

    from sdxl_ref.images import fit, from_tensor, load_image, save_png
    from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline, ImageToImageRequest

    device = pick_device(a.device)
    loaded = load_image(a.image)
    picture = fit(loaded, MAX_PIXELS)
    request = ImageToImageRequest(
        prompt=a.prompt,
        negative_prompt=a.negative_prompt,
        image=picture,
        strength=a.strength,
        strength_rule=a.strength_rule,
        num_inference_steps=a.steps,
        guidance_scale=a.guidance_scale,
        guidance_rescale=a.guidance_rescale,
        aesthetic_score=a.aesthetic_score,
        negative_aesthetic_score=a.negative_aesthetic_score,
        sampler=a.sampler,
        spacing=a.spacing,
        karras=a.karras,
        generator=[torch.Generator().manual_seed(a.seed)],
    )
    plan = ImageToImagePipeline.plan(request)  # before the weights are read
    pipe = ImageToImagePipeline.from_single_file(a.checkpoint, dtype=getattr(torch, a.dtype), device=device)
    assert pipe.checkpoint is not None
    print(f"{pipe.checkpoint.path.name}: {pipe.checkpoint.name}, {a.dtype} on {device}")
    if pipe.checkpoint.note:
        print(f"note: {pipe.checkpoint.note}")
    print(f"picture: {loaded.width}x{loaded.height}, used at {picture.width}x{picture.height}")
    print(f"plan: {plan}", flush=True)
    with ThreadPoolExecutor(1) as hashing:
        hashes = hashing.submit(identity, pipe.checkpoint)
        steps = pipe.steps(request)
        for step in tqdm(steps, total=len(plan.grid.timesteps), unit="step", disable=None):  # noqa: B007
            pass
        with torch.no_grad():
            [result] = from_tensor(pipe.decode(step.x))
        settings = {
            key: value for key, value in vars(a).items() if key not in ("run", "checkpoint", "out", "save_latents")
        }
        settings |= {
            "command": "refine",
            "num_inference_steps": settings.pop("steps"),
            "size": f"{picture.width}x{picture.height}",
            "sigmas": plan.grid.sigmas.tolist(),
            "timesteps": plan.grid.timesteps,
            "unconditional": "negative prompt encoded, the empty one too" if a.guidance_scale > 1 else "none",
            "checkpoint": {"file": pipe.checkpoint.path.name, **hashes.result()},
            "versions": {"sdxl_ref": __version__, "torch": torch.__version__},
        }
    if a.save_latents:
        save_latents(a.save_latents, step.x, float(step.sigma))
    save_png(result, out, settings)
    print(f"wrote {out}")


def info(a: argparse.Namespace) -> None:
    from sdxl_ref.info import report

    print("\n".join(report(a.checkpoint, a.check)))


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """What a picture's settings say of the weights that made it."""
    from sdxl_ref.checkpoint import KNOWN_FILES

    digest = checkpoint.sha256()
    vae = KNOWN_FILES.get(digest, ("", "unknown"))[1]
    return {"sha256": digest, "vae": vae, "vae_tensors_sha256": checkpoint.tensor_hash("vae")}


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had: expected auto, cpu, cuda or mps ({error})") from error


def writable(path: Path) -> None:
    """InputError unless a file can be written there: found out before the work, not after it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: expected a file name in an existing, writable folder")


def save_latents(path: Path, latents: Tensor, sigma: float) -> None:
    """Latents (b,4,h,w) in sigma space, scaled by 0.13025, with their sigma in the metadata."""
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}.part")
    save_file({"latents": latents.cpu().contiguous()}, beside, {"sigma": repr(sigma)})
    beside.replace(path)
