"""What the C library makes of allocations: how much of the system's memory a process has for them.

glibc's rules, as malloc(3) and mallopt(3) tell them: large blocks are the system's own pages and go back when freed;
others lie in one heap, whose holes stay, and which shrinks at its end alone. What counts as large follows what was
freed. Where blocks of many sizes come and go, the holes are a third of the memory.
"""

from bisect import bisect, insort

SMALLEST_LARGE = 2**17  # bytes: M_MMAP_THRESHOLD at first
LARGEST_HELD = 2**25  # what it can rise to
PAGE = 2**12


class Heap:
    """Blocks by the address that `allocate` returns; `size` is what the process has, `peak` the most that it had."""

    def __init__(self, threshold: int = SMALLEST_LARGE, keeps_growing: bool = True) -> None:
        self.threshold = threshold
        self.keeps_growing = keeps_growing
        self.pages = 0  # of large blocks, in bytes
        self.end = 0  # of the heap
        self.holes: list[tuple[int, int]] = []  # (address, size), sorted, no two of them touching
        self.blocks: dict[int, int] = {}
        self.large: dict[int, int] = {}
        self.peak = 0

    @property
    def size(self) -> int:
        return self.pages + self.end

    def allocate(self, count: int) -> int:
        """A block of so many bytes; its address, below 0 for a large one."""
        count = -(-max(count, 1) // PAGE) * PAGE
        if count >= self.threshold:
            address = -len(self.large) - 1
            while address in self.large:
                address -= 1
            self.large[address] = count
            self.pages += count
        else:
            address = self.fit(count)
            self.blocks[address] = count
        self.peak = max(self.peak, self.size)
        return address

    def fit(self, count: int) -> int:
        """The smallest hole that is large enough, or the end of the heap, which a last hole may reach."""
        fitting = [(size, address) for address, size in self.holes if size >= count]
        if fitting:
            size, address = min(fitting)
            self.holes.remove((address, size))
            if size > count:
                insort(self.holes, (address + count, size - count))
            return address
        address = self.end
        if self.holes and sum(self.holes[-1]) == self.end:
            address, _ = self.holes.pop()
        self.end = address + count
        return address

    def free(self, address: int) -> None:
        if address < 0:
            count = self.large.pop(address)
            self.pages -= count
            if self.keeps_growing and self.threshold < count <= LARGEST_HELD:
                self.threshold = count
            return
        count = self.blocks.pop(address)
        i = bisect(self.holes, (address, 0))
        if i < len(self.holes) and self.holes[i][0] == address + count:
            count += self.holes.pop(i)[1]
        if i and sum(self.holes[i - 1]) == address:
            address, before = self.holes.pop(i - 1)
            count += before
        if address + count == self.end and count > 2 * self.threshold:  # M_TRIM_THRESHOLD
            self.end = address
        else:
            insort(self.holes, (address, count))
