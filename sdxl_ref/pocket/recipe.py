"""The recipe: everything that makes the pocket pair, from nothing, in stages that can be stopped and resumed.

    python -m sdxl_ref.pocket.recipe --out DIR [--device cuda] [--stage vae …]

Stages: `towers` (both text towers, on captions and what their pictures show; frozen afterwards, as SDXL's are), `vae`
(autoencoder on crops of scenes), `vae-more` (goes on with whole pictures, of other looks too), `latents` (scenes
through it, once), `base` (its UNet), `refiner` (its UNet on t in 0..199, with the base's OpenCLIP tower), `base-more`
and `refiner-more` (each goes on, its loss weighted for higher noise), `base-last` and `refiner-last` (once more, on all
that they are used for), `write` (two files in the official layout, float16).
The time of each is kept in DIR/times.json; README.md beside this file has the figures.
"""

import argparse
import json
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import nn

from sdxl_ref.config import InputError
from sdxl_ref.pocket.autoencoder import AUTOENCODER, encode_scenes, train_autoencoder, trained_autoencoder
from sdxl_ref.pocket.stages import SETTINGS, RecipeFolder, part_of
from sdxl_ref.pocket.towers import train_towers
from sdxl_ref.pocket.unets import OBJECTIVES, stages_of, train_unet
from sdxl_ref.training.state import locked
from sdxl_ref.weights.checkpoint import build, prefixes
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.file_saving import write_text

TRAINED = {  # the function of each stage that trains
    "towers": train_towers,
    **dict.fromkeys(AUTOENCODER, train_autoencoder),
    **dict.fromkeys(OBJECTIVES, train_unet),
}
STAGES = ("towers", *AUTOENCODER, "latents", *OBJECTIVES, "write")


def run_stage(folder: RecipeFolder, stage: str, stop: int | None = None) -> bool:
    """Run one stage, and time it; whether it came to its end, and not only to step `stop`.

    The times of the pieces of a stage that is resumed add up.
    """
    start = time.perf_counter()
    try:
        with locked(folder.path / stage) if stage in SETTINGS else nullcontext():
            if stage in SETTINGS:
                TRAINED[stage](folder, stage, stop)
            elif stage == "latents":
                encode_scenes(folder, stage)
            else:
                write_pair(folder)
    finally:
        add_time(folder.path / "times.json", stage, time.perf_counter() - start)
    return stage == "write" or folder.result_path(stage).exists()


def add_time(path: Path, stage: str, seconds: float) -> None:
    """Add to the time of a stage in a file; one that cannot be read is replaced."""
    times: dict[str, float] = {}
    with suppress(OSError, ValueError):
        times = dict(json.loads(path.read_text()))
    times[stage] = round(times.get(stage, 0.0) + seconds, 1)
    write_text(path, json.dumps(times))


def write_pair(folder: RecipeFolder) -> None:
    """Both files, from the last stage of each that has come to its end."""
    last_stages = {}
    for kind in folder.configs:
        ended = [stage for stage in stages_of(kind) if folder.result_path(stage).exists()]
        last_stages[kind] = ended[-1] if ended else kind
    results = {kind: folder.result(stage) for kind, stage in last_stages.items()}
    for kind, config in folder.configs.items():
        parts: dict[str, nn.Module] = {"vae": trained_autoencoder(folder)}
        for part in prefixes(config):
            if part != "vae":
                parts[part] = build(part, config)
                parts[part].load_state_dict(part_of(results[kind], part))
        save_checkpoint(folder.path / f"pocket_{kind}.safetensors", config, parts, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--stage", action="append", choices=STAGES, help="one, or several; else all, in order")
    parser.add_argument(
        "--stop", type=int, help="stop the training of a stage at this step, without a result; it goes on another time"
    )
    a = parser.parse_args()
    try:
        if a.stop is not None and a.stop < 1:
            raise InputError(f"expected a step of at least 1 to stop at, found {a.stop}")
        folder = RecipeFolder(a.out, a.device)
        for stage in a.stage or STAGES:
            if not run_stage(folder, stage, a.stop):
                print(f"{stage}: stopped at step {a.stop}, goes on when started again")
                break
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(1, "stopped\n")


def device(name: str) -> torch.device:
    """An option's value. ArgumentTypeError for what names no device."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda, found {name!r}") from error


if __name__ == "__main__":
    main()
