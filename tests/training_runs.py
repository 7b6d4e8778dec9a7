"""For the tests of training: `sdxl-ref train` on tiny models, in this process or in processes of its own.

Processes are forked from one that has imported torch already (multiprocessing's forkserver), which takes seconds.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training_data import CONFIGS

from sdxl_ref.cli import main
from sdxl_ref.training.state import STATE, locked
from sdxl_ref.weights.checkpoint_saving import save_checkpoint

CAPTIONS = ("a red cup", "a blue cup", "two cups", "no cup")
SERVER: Any = multiprocessing.get_context("forkserver")
# the first two are imported by a run, and the last one by an optimizer
SERVER.set_forkserver_preload(["sdxl_ref.commands.train", "sdxl_ref.training.sharded", "torch._dynamo"])


def save_model(path: Path, kind: str = "refiner", dtype: torch.dtype = torch.float32) -> Path:
    config = CONFIGS[kind]
    parts = peers.networks(config)
    save_checkpoint(path, config, parts, dtype)
    return path


def save_pictures(folder: Path, size: tuple[int, int] = (128, 128)) -> Path:
    """Four captioned pictures of few details, with scores."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, caption in enumerate(CAPTIONS):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": caption, "aesthetic_score": 5.0 + i})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(checkpoint: Path, data: Path, out: Path, *options: str) -> list[str]:
    paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out)]
    return ["train", *paths, "--device", "cpu", "--warm-up", "0", *options]


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / STATE)


def metadata_of_state(folder: Path) -> dict[str, str]:
    with safe_open(folder / STATE, framework="pt") as file:
        return dict(file.metadata())


def step_of(folder: Path) -> int:
    """The step of the state in a folder."""
    return int(metadata_of_state(folder)["step"])


def run_command(words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """`sdxl-ref` in a process of its own: what it prints goes into a file."""
    os.environ.update(environment)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(words))


def start(
    words: Sequence[str], output: Path, target: Callable[..., None] = run_command, **environment: str
) -> BaseProcess:
    """Start `sdxl-ref` in a process of its own."""
    process: BaseProcess = SERVER.Process(target=target, args=(list(words), environment, output))
    process.start()
    return process


def start_two(
    words: Sequence[str], folder: Path, target: Callable[..., None] = run_command, **environment: str
) -> list[BaseProcess]:
    """Start two processes of one run, as torchrun would; they print into `0.txt` and `1.txt` of a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
        environment |= address
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in ("0", "1"):
        processes.append(start(words, folder / f"{rank}.txt", target, RANK=rank, LOCAL_RANK=rank, **environment))
    return processes


def output_of(processes: Sequence[BaseProcess], folder: Path) -> tuple[str, list[int | None]]:
    """What the two processes printed, and their exit statuses, once both have ended."""
    for process in processes:
        process.join(timeout=300)
    text = "".join((folder / f"{rank}.txt").read_text() for rank in range(len(processes)))
    return text, [process.exitcode for process in processes]


def launch_torchrun(words: Sequence[str]) -> "subprocess.Popen[str]":
    """Two processes by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*torchrun, "-m", "sdxl_ref", *words], env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def hold_lock(folder: Path, connection: Any) -> None:
    """In a process of its own: hold the lock on a folder until the process is ended."""
    with locked(folder):
        connection.send("held")
        connection.recv()
