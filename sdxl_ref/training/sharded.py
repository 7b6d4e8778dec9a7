"""Full fine-tuning that no single device can hold: each process keeps its rows of every tensor, and no more.

FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277) gathers a block's weights when it works, and gives each
process its rows of the block's gradients, averaged. Moments and averaged weights are of these rows alone. The state is
written by torch.distributed.checkpoint, as safetensors, since its own format is a pickle; it goes on with any number of
processes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sdxl_ref.config import InputError
from sdxl_ref.networks.unet import ResBlock, TransformerBlock
from sdxl_ref.training.diffusion import recompute_activations
from sdxl_ref.training.loop import MOMENTS, Run, StepLoss, at_least_float32
from sdxl_ref.training.processes import replacing_folder_for_all, this_process
from sdxl_ref.training.shard_plan import units
from sdxl_ref.training.state import SHARDS, SHARDS_FACTS, check_same, damaged
from sdxl_ref.weights.checkpoint import READ_AT_ONCE, Checkpoint, build_empty, prefixes

FILE_BYTES = 1 << 30  # of a process's file in the state, about: each is put together in memory


def load_shards(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, recomputes: bool) -> nn.Module:
    """A checkpoint's UNet in shards, one for each process of the group, ready to learn.

    It is built on the meta device, and each process reads its own rows of each tensor: none holds it whole.
    `recomputes`: a block keeps its inputs alone for the backward pass.
    """
    unet = build_empty("unet", checkpoint.config).to(dtype)
    mesh = init_device_mesh(device.type, (this_process().count,))
    for module in units(unet).values():
        if recomputes and isinstance(module, ResBlock | TransformerBlock):
            recompute_activations(module)  # inside of what FSDP does around the block, so that nothing is gathered anew
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    unet.to_empty(device=device)
    fill_shards(unet, checkpoint)
    return unet


@torch.no_grad()
def fill_shards(unet: nn.Module, checkpoint: Checkpoint) -> None:
    """Give each tensor's rows that this process keeps their values. InputError where the file has changed."""
    prefix = prefixes(checkpoint.config)["unet"]
    weights = list(unet.named_parameters())
    for i in range(0, len(weights), READ_AT_ONCE):
        with checkpoint.reader() as read:
            for name, weight in weights[i : i + READ_AT_ONCE]:
                assert isinstance(weight, DTensor)
                weight.to_local().copy_(rows_of(read(prefix + name)))
    checkpoint.require_unchanged()


def rows_of(tensor: Tensor) -> Tensor:
    """The rows of a whole tensor that this process keeps, as FSDP deals them out: none where there are too few."""
    process = this_process()
    pieces = tensor.chunk(process.count)  # (rows,...) -> at most `count` times (ceil(rows / count),...)
    return pieces[process.rank] if process.rank < len(pieces) else tensor[:0]


class ShardedRun(Run):
    """A `Run` whose module is in shards; the state is a folder, written by all processes.

    `weights` and `averaged` are this process's rows, plain tensors: what optimizer and averages do needs no other ones.
    Every process has to save at the same step: so none does after an error that the others may not have met.
    """

    state_name = SHARDS
    caches_casts = False  # the whole UNet would come to lie on every device, in bfloat16

    def averages(self) -> Mapping[str, Tensor]:
        return {name: as_shard(average, self.shards[name]) for name, average in self.averaged.items()}

    def save(self) -> None:
        tensors = self._tensors()
        with replacing_folder_for_all(self.folder / SHARDS) as beside:
            writer = HuggingFaceStorageWriter(str(beside), numbered_files(tensors), save_distributed=True)
            with explained(f"could not write {self.folder / SHARDS}"):
                state_dict_saver.save(tensors, storage_writer=writer)
            if self.leads:
                facts = {**self._facts(), "files": sorted(os.listdir(beside))}
                (beside / SHARDS_FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def _resume(self) -> None:
        path = self.folder / SHARDS
        facts = check_same(self.folder, self.identity, name=SHARDS)
        missing = sorted(set(facts.get("files", ["its files"])) - set(os.listdir(path)))
        if missing:  # whose rows would stay what they are, without an error
            raise damaged(path, f"it has no {missing[0]}")
        self.step = int(facts["step"])
        if self.step:
            for p in self.weights.values():
                moments = {moment: torch.zeros_like(p.detach()) for moment in MOMENTS}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        try:
            with explained("could not read it"):
                reader = HuggingFaceStorageReader(str(path))
                state_dict_loader.load(self._tensors(), storage_reader=reader)
        except InputError as error:
            raise damaged(path, error) from error

    def _learned_weights(self) -> dict[str, nn.Parameter]:
        self.shards: dict[str, DTensor] = dict(self.module.named_parameters())  # type: ignore[arg-type]
        return {name: nn.Parameter(shard.to_local().detach()) for name, shard in self.shards.items()}  # same memory

    def _tensors(self) -> dict[str, Tensor]:
        return {key: as_shard(rows, self.shards[key.partition(".")[2]]) for key, rows in super()._tensors().items()}

    def _backward(self, step_loss: StepLoss) -> Tensor:
        loss = super()._backward(step_loss)
        for name, shard in self.shards.items():
            assert isinstance(shard.grad, DTensor)
            self.weights[name].grad = shard.grad.to_local()
            shard.grad = None
        return loss

    def _clip(self) -> float:
        rows = nn.utils.get_total_norm([p.grad for p in self.weights.values() if p.grad is not None])
        square = at_least_float32(rows) ** 2
        distributed.all_reduce(square)
        nn.utils.clip_grads_with_norm_(self.weights.values(), self.settings.clip, square.sqrt())
        return float(square.sqrt())

    def _can_save_after(self, error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt)


def as_shard(rows: Tensor, like: DTensor) -> DTensor:
    """Rows of this process as its shard of a tensor that lies as another one does: the same memory."""
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@contextmanager
def explained(what: str) -> Iterator[None]:
    """InputError, in every process, for what torch.distributed.checkpoint met in one of them."""
    try:
        yield
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise InputError(f"{what}: {getattr(reason, 'strerror', None) or reason}") from error


def numbered_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1 on, that holds a process's rows of each tensor."""
    numbers = {}
    total = 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + total // (FILE_BYTES * this_process().count)
        total += tensor.numel() * tensor.itemsize
    return numbers
