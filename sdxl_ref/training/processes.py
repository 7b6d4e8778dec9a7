"""Several processes on one run (`torchrun`): who leads, what the first one does alone, and averaged gradients."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sdxl_ref.config import InputError
from sdxl_ref.training.state import locked
from sdxl_ref.weights.folder_saving import replacing_folder

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
PATIENCE = timedelta(hours=12)  # of a process for another one, which may be encoding a large data set


@dataclass(frozen=True)
class Process:
    """Which of the run's processes this is."""

    rank: int
    count: int  # how many there are

    @property
    def leads(self) -> bool:
        """Whether it is the first one, which writes and reports."""
        return self.rank == 0


def this_process() -> Process:
    """Alone, it is the first of one."""
    if distributed.is_initialized():
        return Process(distributed.get_rank(), distributed.get_world_size())
    return Process(0, 1)


def is_alone() -> bool:
    """Whether torchrun has started no other process than this one, or was not used."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def check_variables() -> None:
    """InputError unless there is all that torchrun sets."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(f"expected torchrun's variables, found no {', '.join(missing)}: use it, or unset WORLD_SIZE")


@contextmanager
def process_group(device: torch.device, is_needed: bool = False) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if it did; yields the device of this one.

    `is_needed`: a process that is alone makes a group of its own.
    """
    if is_alone() and not is_needed:
        yield device
        return
    start_group(device)
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    finally:
        distributed.destroy_process_group()


def start_group(device: torch.device) -> None:
    """Join a group, with the device that torchrun says. InputError where it does not say all."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if is_alone():
        if device.index is not None:
            torch.cuda.set_device(device)
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    check_variables()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=PATIENCE)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended."""
    return isinstance(error, ConnectionError | distributed.DistError) or "gloo" in str(error)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does what follows while the others wait; then they do. Where it fails, they end."""
    process = this_process()
    has_succeeded = [False]
    if not process.leads:
        distributed.broadcast_object_list(has_succeeded)
        if not has_succeeded[0]:
            raise InputError("the first process failed")
    try:
        yield
        has_succeeded = [True]
    finally:
        if process.leads and process.count > 1:
            distributed.broadcast_object_list(has_succeeded)


@contextmanager
def locked_for_all(folder: Path) -> Iterator[None]:
    """No other run works in a folder meanwhile: the first process holds the lock. InputError where one does."""
    with ExitStack() as locks:
        with first_alone():
            if this_process().leads:
                locks.enter_context(locked(folder))
        yield


@contextmanager
def replacing_folder_for_all(target: Path) -> Iterator[Path]:
    """A folder for all processes to write in; once all have, it takes the target's place, see `replacing_folder`.

    InputError where not all of them see it.
    """
    path: list[Path | None] = [None]
    with ExitStack() as stack:
        with first_alone():
            if this_process().leads:
                beside = stack.enter_context(replacing_folder(target))
                beside.mkdir()
                path = [beside]
        distributed.broadcast_object_list(path)
        assert path[0] is not None
        are_there: list[bool | None] = [None] * this_process().count
        distributed.all_gather_object(are_there, path[0].is_dir())
        if not all(are_there):
            raise InputError(f"expected {target.parent} on a disk that all processes share: choose another --out")
        yield path[0]
        distributed.barrier()
        with first_alone():
            stack.close()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part (a DTensor), gathered in each of them; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicate(loss: nn.Module, some_unused: bool) -> DistributedDataParallel | None:
    """The wrapper of a loss that averages gradients over the processes; None where there is only one."""
    if not distributed.is_initialized():
        return None
    return DistributedDataParallel(loss, find_unused_parameters=some_unused)


def report(*lines: str) -> None:
    """Print lines, from the first process alone."""
    if this_process().leads:
        for line in lines:
            print(line, flush=True)
