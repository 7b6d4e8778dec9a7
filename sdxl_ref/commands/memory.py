"""Memory that cannot be had, told in one line. Imported by `sdxl_ref.cli` when an error may be of that kind."""

import re
import sys

# As torch says it of a CPU, of Windows, and of CUDA, MPS and others; of CUDA's libraries; of sizes past all memory.
SIGNS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|Cannot allocate memory|bad_alloc"
    r"|Storage size calculation overflowed|invalid buffer size|Invalid buffer size",
    re.IGNORECASE,
)
AMOUNT = re.compile(r"allocate (?P<bytes>\d+) bytes|allocate (?P<words>[\d.]+ [KMGTP]i?B)")
ADVICE = (
    "close other programs, or ask for less: --dtype bfloat16 or float16, a smaller picture or batch, fewer at once; "
    "of generate also --low-memory, of train --gradient-checkpointing or a LoRA"
)


def tell(name: str, error: BaseException) -> int:
    """Print a command's line of advice for memory that was not to be had, and return its status; raise other errors."""
    text = str(error)
    if not isinstance(error, MemoryError) and not SIGNS.search(text):
        raise error
    amount = AMOUNT.search(text)
    wanted = ""
    if amount:
        wanted = f" ({amount['words'] or in_gigabytes(int(amount['bytes']))} at once)"
    place = "the GPU's memory" if re.search("CUDA|HIP|MPS|XPU", text) else "memory"
    print(f"{name}: error: {place} is not enough{wanted}: {ADVICE}", file=sys.stderr)
    return 1


def in_gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
