"""Several processes on one batch (`torchrun`): each draws the next piece of work from the store that they meet at.

Who draws a piece holds it, and shows that it is alive by a pulse that it counts up. A holder whose pulse stands still
for a lease, by the clock of whoever looks, is taken for lost, and another one draws what it held: clocks of machines
are never compared, and one that jumps does no harm.
"""

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sdxl_ref.training.processes import check_variables, is_alone

PATIENCE = timedelta(minutes=10)  # for the other processes to begin
BEATS = 6  # of the pulse in a lease
NOBODY = "nobody"


class Ranks:
    """This process among the others. `lease` in seconds."""

    def __init__(self, store: Any, rank: int, count: int, lease: float) -> None:
        self.store = store
        self.rank = rank
        self.count = count
        self.lease = lease
        threading.Thread(target=self.beat, daemon=True).start()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """Which of its machine's processes this is."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def tell(self, jobs: int) -> int:
        """Add to how many jobs all processes have done, and return that."""
        return self.store.add("jobs", jobs)

    def beat(self) -> None:
        """Count up the pulse for as long as the store is there."""
        try:
            while True:
                self.store.add(f"pulse {self.rank}", 1)
                time.sleep(self.lease / BEATS)
        except (RuntimeError, ConnectionError):
            return

    def say(self, word: str) -> None:
        """Tell the others that something is so."""
        self.store.set(word, "")

    def wait_for(self, word: str) -> None:
        """Until another process has said so. DistError where none does in time."""
        self.store.wait([word], PATIENCE)

    def draw(self, count: int) -> Iterator[int]:
        """Numbers below `count`: over all processes each once, and again those that a lost one held.

        A number is finished when the next one is asked for. Ends when all are finished, whoever did them.
        """
        while (number := self.store.add("drawn", 1) - 1) < count:
            self.store.compare_set(f"holder {number}", "", str(self.rank))
            yield number
            self.finish(number)
        yield from self.draw_lost(count)

    def draw_lost(self, count: int) -> Iterator[int]:
        seen: dict[int, tuple[str, int, float]] = {}  # holder, pulse, and since when it stands at that
        open_numbers = list(range(count))
        while self.store.add("finished", 0) < count:
            open_numbers = [number for number in open_numbers if not self.store.check([f"finished {number}"])]
            for number in open_numbers:
                holder = self.store.compare_set(f"holder {number}", "", NOBODY).decode()
                pulse = 0 if holder == NOBODY else self.store.add(f"pulse {holder}", 0)
                now = time.monotonic()
                if seen.get(number, ())[:2] != (holder, pulse):
                    seen[number] = holder, pulse, now
                elif now - seen[number][2] > self.lease and self.takes(number, holder):
                    yield number
                    self.finish(number)
            time.sleep(min(1.0, self.lease / BEATS))

    def takes(self, number: int, holder: str) -> bool:
        """Whether this process is the one that a lost holder's number goes to."""
        mine = str(self.rank)
        return holder != mine and self.store.compare_set(f"holder {number}", holder, mine).decode() == mine

    def finish(self, number: int) -> None:
        if self.store.add(f"finished {number}", 1) == 1:
            self.store.add("finished", 1)


def join(lease: float) -> Ranks | None:
    """This process among those that torchrun started; None where it started none. InputError without its variables."""
    if is_alone():
        return None
    check_variables()
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    turn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a store outlives the processes that begin again
    return Ranks(PrefixStore(f"batch {turn}", store), rank, count, lease)
