"""The model of memory: tensors as long as they live, the kernels' buffers, and the C library's heap around them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from sdxl_ref.networks.heap_model import PAGE, Heap
from sdxl_ref.networks.memory_model import peak_memory

MB = 2**20


def exact() -> Heap:
    """Where every block is the system's own."""
    return Heap(threshold=1, keeps_growing=False)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_tensors_count_while_they_live() -> None:
    x = meta(MB // 4)

    def run() -> None:
        a = x + 1  # 1 MB
        b = torch.cat([a, a])  # 2 MB
        del a
        c = b.view(2, -1).t()  # no memory of its own
        c.mul_(2)  # nor that
        del b, c
        torch.cat([x, x])

    assert peak_memory(run, exact()) == 3 * MB


def test_weights_and_inputs_are_not_the_evaluations() -> None:
    weight, x = meta(1024, 256), meta(256, 256)
    assert peak_memory(lambda: linear(x, weight), exact()) == MB


def test_convolutions_have_buffers() -> None:
    """Of a CPU in float32: the copies of input and weight beside the result; in half precision of the result twice."""
    x, weight = meta(1, 16, 128, 128), meta(16, 16, 3, 3)
    copies = 3 * PAGE  # of the weight, 9 KB
    assert peak_memory(lambda: conv2d(x, weight, padding=1), exact()) == 2 * MB + copies
    assert peak_memory(lambda: conv2d(x, weight, padding=1), exact(), onednn=False) == MB
    half = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    assert peak_memory(lambda: conv2d(*half, padding=1), exact()) == 3 * MB // 2
    assert peak_memory(lambda: conv2d(*half, padding=1), exact(), packed=True) == MB // 2


def test_attention_keeps_all_scores_only_where_no_kernel_works_by_blocks() -> None:
    q = meta(1, 1, 1024, 64)
    assert peak_memory(lambda: scaled_dot_product_attention(q, q, q), exact()) == MB // 4
    across = meta(1, 1, 64, 1024).transpose(2, 3)
    assert peak_memory(lambda: scaled_dot_product_attention(across, across, across), exact()) >= 8 * MB


def test_large_blocks_go_back_to_the_system() -> None:
    heap = Heap(keeps_growing=False)
    heap.free(heap.allocate(MB))
    assert (heap.size, heap.peak) == (0, MB)


def test_holes_stay_until_something_fits() -> None:
    heap = Heap()
    first, second, third = (heap.allocate(10 * PAGE) for _ in range(3))
    heap.free(second)
    assert heap.size == 30 * PAGE
    assert heap.allocate(4 * PAGE) == second
    assert heap.allocate(7 * PAGE) == 30 * PAGE  # the hole has 6 pages left
    assert heap.allocate(6 * PAGE) == second + 4 * PAGE
    heap.free(first)
    assert heap.size == 37 * PAGE
    assert third == 20 * PAGE


def test_what_is_freed_makes_larger_blocks_the_heaps() -> None:
    """And the heap gives back from its end alone, what is twice as much."""
    heap = Heap()
    heap.free(heap.allocate(MB))
    small, large = heap.allocate(MB // 2), heap.allocate(MB - PAGE)
    assert small >= 0
    heap.free(large)
    assert heap.size == 3 * MB // 2 - PAGE
    others = [heap.allocate(MB - PAGE) for _ in range(3)]
    for block in reversed(others):
        heap.free(block)
    assert heap.size < 2 * MB
    heap.free(heap.allocate(64 * MB))  # no block of 32 MB or more raises it
    assert heap.threshold == MB
