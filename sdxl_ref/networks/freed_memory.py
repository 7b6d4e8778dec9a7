"""What glibc does with the memory that tensors free. Other C libraries and systems stay as they are."""

import ctypes
import sys

KEPT_BLOCKS = 1 << 28  # bytes: larger ones stay the system's


def keep_freed_memory() -> None:
    """Have glibc make tensors of freed memory, instead of the system's new pages each time.

    Blocks of up to 256 MiB. Other systems, and a glibc before 2.35, stay as they are.
    """
    if sys.platform != "linux":
        return
    mmap_threshold = -3
    trim_threshold = -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(mmap_threshold, KEPT_BLOCKS):
        mallopt(trim_threshold, KEPT_BLOCKS)


def give_freed_memory_back() -> None:
    """Have glibc hand what was freed to the system: it keeps up to two gigabytes of dropped weights otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
