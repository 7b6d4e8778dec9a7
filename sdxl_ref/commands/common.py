"""What every command that makes pictures shares: its options, the checks before the work, and the written picture."""

import argparse
import os
import secrets
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import count
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from sdxl_ref import __version__
from sdxl_ref.config import PREDICTIONS, InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.pictures.settings import png_chunks, texts
from sdxl_ref.pipelines.request import SAMPLER_OPTIONS, Request
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.identity import name_of, vae_name
from sdxl_ref.weights.saving import PREFIX, replacing
from sdxl_ref.weights.tensor_files import sha256_of

GUIDANCE = ("negative_prompt", "guidance_scale", "guidance_rescale", "guidance_interval")  # fields of a request
SAMPLING = ("sampler", "spacing", "karras", "sigmas", "timesteps", *SAMPLER_OPTIONS)
LISTS = ("guidance_interval", "sigmas", "timesteps")  # of these: several numbers
DTYPES = ("float32", "bfloat16", "float16")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")  # of pictures that are written
VARIANT = "fp16: read files such as model.fp16.safetensors of a folder or a repository"
SWITCHES = ("switch", "switch_sigma", "switch_step")  # of the ensemble
TEXT = ("prompt_syntax", "clip_skip")
SHARED = ("prompt", *TEXT, "tile", *GUIDANCE, *SAMPLING)  # what both commands have options for
Painted = tuple[list[Image.Image], torch.Tensor, dict[str, Any]]  # pictures, final latents (b,4,h,w), settings


def add_switch_options(p: argparse.ArgumentParser) -> None:
    """Those of the ensemble, without its module: see `EnsembleRequest`."""
    p.add_argument("--switch", type=float, help="hand-off after this share of the training steps, in (0, 1] (0.8)")
    p.add_argument("--switch-sigma", type=float, help="the lowest noise level that is the base's, instead")
    p.add_argument("--switch-step", type=int, help="the number of steps that start in the base, instead")


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompt", required=True, help="what the picture shows")
    p.add_argument("--steps", type=int, default=50, help="steps of the whole schedule")
    p.add_argument("--sampler", help=f"{', '.join(SAMPLERS)}; default: the model's own, or euler")
    own = ("prompt", "sampler", *LISTS)
    add_request_options(p, Request, *(name for name in SHARED if name not in own))
    p.add_argument("--embedding", action="append", default=[], metavar="FILE", help="textual inversion; repeatable")
    for field in fields(Request):
        if field.name in LISTS:
            flag = f"--{field.name.replace('_', '-')}"
            p.add_argument(flag, type=levels, metavar="LIST|FILE", help=field.metadata["meaning"])
    p.add_argument("--variant", help=VARIANT)
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the UNet returns, in place of what the file says")
    p.add_argument("--seed", type=seed, default=0, help="of the noise: the same seed, the same picture; -1 draws one")
    for part, what in (("", "of UNet and text encoders"), ("vae-", "of the VAE, which overflows in float16")):
        p.add_argument(f"--{part}dtype", default="float32", choices=DTYPES, help=what)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    p.add_argument(
        "--plain", action="store_true", help="on a CPU: weights in their own order, not its kernels'; slower"
    )
    p.add_argument("--compile", action="store_true", help="UNet and VAE by torch.compile, instead of packing them")
    p.add_argument("--vae", metavar="MODEL", help="a VAE's file or folder, for the model's own or where it has none")
    p.add_argument("--watermark", action="store_true", help="put the official code's invisible one in")
    p.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="put an adapter on; repeatable")
    p.add_argument("--out", type=Path, metavar="FILE", help="a .png, .jpg, .webp or .tiff; replaced if it is there")
    p.add_argument("--save-latents", type=Path, metavar="FILE", help="also write the final latents, as safetensors")


def add_request_options(p: argparse.ArgumentParser, request_type: type[Request], *names: str) -> None:
    """An option for each of these fields of a request, with its type, default and meaning."""
    for field in fields(request_type):
        if field.name not in names:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        meaning = field.metadata["meaning"]
        if field.type in (bool, bool | None):
            action = "store_true" if field.type is bool else argparse.BooleanOptionalAction
            p.add_argument(flag, action=action, help=meaning)
            continue
        kinds = get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        number: Any = next((kind for kind in (int, float) if kind in kinds or type(field.default) is kind), str)
        p.add_argument(flag, type=number, default=field.default, help=meaning)


def levels(text: str) -> list[float]:
    """Of an option that takes several numbers. The one place that imports what reads them."""
    from sdxl_ref.diffusion import own_levels

    try:
        return own_levels.read(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sampling_settings(request: Request) -> dict[str, Any]:
    """The sampler, its levels and its options of a completed request, as a picture's settings have them."""
    return {name: getattr(request, name) for name in SAMPLING} | {"spacing": str(request.spacing)}


def seed(text: str) -> int:
    """A number that a generator takes. -1 draws one, and prints it."""
    if not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from -2^63 to 2^64 - 1, found {text}")
    if int(text) == -1:
        text = str(secrets.randbits(32))
        print(f"seed: {text}")
    return int(text)


def dtypes(a: argparse.Namespace) -> dict[str, Any]:
    """Those of the options, as `from_pretrained` takes them."""
    return {name: getattr(torch, getattr(a, name)) for name in ("dtype", "vae_dtype")}


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto": the best that is there. InputError where it is not to be had."""
    if name != "auto":
        from sdxl_ref.commands.devices import named_device

        return named_device(name)
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if backend.is_available():
            return torch.device(kind)
    return torch.device("cpu")


def check_writable(*paths: Path | None, read: Sequence[object] = ()) -> None:
    """InputError unless files can be written there, on none that is read: found out before the work, not after it.

    `read` is all that the command reads: files, folders with all that is in them, names of models.
    """
    targets = [path for path in paths if path is not None]
    places = [os.path.realpath(path) for path in targets]
    folders = [Path(place).parent for place in places]  # of what a link points to
    for i, path in enumerate(targets):
        if places[i] in places[:i] + places[i + 1 :]:
            raise InputError(f"cannot write {path}: another result is written there: name another one")
        is_short = len(os.fsencode(path.name)) <= 255
        is_free = os.path.isfile(path) or not os.path.lexists(path)
        if not (is_short and is_free and os.path.isdir(folders[i]) and os.access(folders[i], os.W_OK)):
            raise InputError(f"cannot write {path}: expected a file name in an existing, writable folder")
    if any(map(os.path.exists, targets)) or any(any(folder.glob(f"{PREFIX}*")) for folder in set(folders)):
        from sdxl_ref.commands.kept import prepare

        prepare(targets, read)


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a picture's settings say of what made it. Reads the file once, for its hash."""
    digest = checkpoint.sha256()
    weights = {"file": checkpoint.path.name, "sha256": digest, "vae": vae_name(checkpoint, digest)}
    return {"checkpoint": weights, "versions": versions()}


def identities(*checkpoints: Checkpoint) -> Callable[[], list[dict[str, Any]]]:
    """Have files hashed while their weights are read, and before another file may take their names; see `identity`."""
    hasher = ThreadPool(1)  # of a daemon: what ends the command meanwhile does not wait for it
    hashing = hasher.map_async(identity, checkpoints)
    hasher.close()
    return hashing.get


def say_changes(checkpoint: Checkpoint | None) -> None:
    """Tell of files that another program has changed since they were opened."""
    for path in checkpoint.changed() if checkpoint else ():
        print(f"note: {path} has changed meanwhile: the settings tell of the file that was read", file=sys.stderr)


def versions() -> dict[str, str]:
    return {"sdxl_ref": __version__, "torch": torch.__version__}


def say_what_runs(checkpoint: Checkpoint, dtype: str, device: torch.device) -> None:
    print(f"{checkpoint.path.name}: {name_of(checkpoint)}, {dtype} on {device}")
    if checkpoint.note:
        print(f"note: {checkpoint.note}")


def check_format(path: Path) -> None:
    """InputError unless the name of a picture says one of the formats that can be written: before the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot write {path}: expected a name that ends in {', '.join(SUFFIXES)}")


def save_picture(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a picture with its settings, in the format of its suffix: never half a file.

    InputError where it cannot be written. The one place that imports other formats than PNG.
    """
    with replacing(path) as beside:
        if path.suffix.lower() == ".png":
            image.save(beside, format="PNG", pnginfo=png_chunks(texts(settings)))
        else:
            from sdxl_ref.pictures import formats

            formats.save(image, beside, path.suffix.lower(), settings)


def save_latents(path: Path | None, latents: torch.Tensor, sigma: float) -> None:
    """Write the final latents, where `--save-latents` is given."""
    if path is not None:
        from sdxl_ref.weights.file_saving import save_latents

        save_latents(path, latents, sigma)


def free_name(path: Path, pictures: int = 1) -> Path:
    """A default name of results: with a number where one of them is there, `generated-2.png`: nothing is replaced."""
    numbers = count(2)
    free = path
    while any(map(os.path.lexists, (free, *names_of_several(free, pictures)))):
        free = path.with_stem(f"{path.stem}-{next(numbers)}")
    return free


def names_of_several(path: Path, pictures: int) -> list[Path]:
    """One for each picture, numbered from 0; their contact sheet has the name itself. Of one picture, the name."""
    return [path] if pictures == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(pictures)]


def experts() -> Any:
    """The module of a base and a refiner together, imported where both are named."""
    from sdxl_ref.commands import experts

    return experts


def masking() -> Any:
    """The module of `--mask`, imported where it is given."""
    from sdxl_ref.pipelines import masking

    return masking


def watermarks() -> Any:
    """The module of `--watermark`, imported where it is given."""
    from sdxl_ref.pictures import watermark

    return watermark


def adapter_files(texts: Sequence[str]) -> list[Path]:
    """The files of `FILE` or `FILE:SCALE`, each once."""
    return adapter_options().files(texts) if texts else []


def put_on(pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Put adapters (`FILE` or `FILE:SCALE`) on a pipeline and say where they fit; returns what its settings say."""
    return adapter_options().put_on(pipe, texts) if texts else {"lora": [], "lora_sha256": []}


def load_embeddings(pipe: Any, files: Sequence[str]) -> dict[str, Any]:
    """Have words stand for the vectors of files; returns what the settings say of them."""
    for file in files:
        pipe.load_textual_inversion(file)
    return {"embeddings": list(files), "embeddings_sha256": [sha256_of(Path(file)) for file in files]} if files else {}


def adapter_options() -> Any:
    """The module of `--lora`, imported where it is given."""
    from sdxl_ref.commands import adapter_options

    return adapter_options


def faster(a: argparse.Namespace, device: torch.device) -> Callable[[Any], dict[str, bool]]:
    """What packs or compiles a pipeline's networks, as the options say: see `sdxl_ref.commands.speed.chosen`."""
    if a.plain and not a.compile:
        return lambda pipe: {"packed": False, "compiled": False}
    from sdxl_ref.commands import speed

    return speed.chosen(a.compile, device)
