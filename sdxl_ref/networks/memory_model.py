"""How much memory a network's evaluation takes, without one: it runs on the meta device, where tensors are sizes alone.

What is counted is what an evaluation allocates: its tensors, from when an operator makes them to when the last name for
them is gone, and the kernels' own buffers. The network's code is run as it is, so that this model follows every change.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_ref.networks.heap_model import Heap

aten = torch.ops.aten
PACKS_KEYS = torch.bfloat16  # for which the attention kernel reorders keys and values


def peak_memory(run: Callable[[], Any], heap: Heap, onednn: bool = True, packed: bool = False) -> int:
    """The most bytes that a process has more, at once, while `run()` works on meta tensors, its result included.

    heap: where they come from, as earlier runs left it. onednn: the buffers of a CPU's kernels too; packed: those of
    packed weights, see `packing.py`.
    """
    allocations = Allocations(heap, onednn, packed)
    heap.peak = heap.size
    with torch.no_grad(), Attention(allocations), allocations:
        run()
    return heap.peak


class Allocations(TorchDispatchMode):
    """Allocates every storage that an operator makes, until it is freed, and the buffers of kernels."""

    def __init__(self, heap: Heap, onednn: bool, packed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heap = heap
        self.onednn = onednn
        self.packed = packed
        self.live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        buffers: list[int] = []
        if func is aten.convolution.default and self.onednn:
            buffers = self.convolution_buffers(args[0], args[1], result)
        known = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            if id(tensor.untyped_storage()) not in known:  # what went in, or a view of it, else
                self.add(tensor)
        self.release(buffers)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.live:
            self.live[key] = self.heap.allocate(storage.nbytes())
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.heap.free(self.live.pop(key))

    def buffers(self, *tensors: Tensor) -> list[int]:
        return [self.heap.allocate(size_of(tensor)) for tensor in tensors]

    def release(self, buffers: Iterable[int]) -> None:
        for address in buffers:
            self.heap.free(address)

    def convolution_buffers(self, x: Tensor, weight: Tensor, result: Tensor) -> list[int]:
        """What oneDNN takes for a convolution beside its result, and still has when that is made, as measured.

        Copies in the order of its kernels: of what goes in and of the weight, then of the result; in half precision
        of the result twice. Packed weights in half precision need none: the maps are in the kernels' order already.
        """
        is_half = x.dtype.itemsize == 2
        if self.packed and is_half:
            return []
        copies = self.buffers(x, weight)
        made = self.buffers(result)
        self.release(copies)
        return made + self.buffers(result) if is_half else made


class Attention(TorchFunctionMode):
    """Attention as the kernel that works by blocks computes it, where a device has it: without the n x n scores."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self.allocations = allocations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
            return scores_and_all(q, k, v)
        result = torch.empty_like(q)
        if self.allocations.onednn and q.dtype == PACKS_KEYS:
            self.allocations.release(self.allocations.buffers(k, v))
        return result


def scores_and_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of torch's other path, which keeps all scores, and works in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (tensor.to(wide) for tensor in (q, k, v))
    scores = (query * 1.0) @ (key * 1.0).transpose(-2, -1)  # (b,heads,n,n)
    return (scores.softmax(dim=-1) @ value).to(q.dtype)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()
