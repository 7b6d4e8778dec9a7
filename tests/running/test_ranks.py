"""Drawing work: each piece once, and again what a lost process held."""

import threading
import time
from typing import Any

import pytest
from torch.distributed import HashStore

from sdxl_ref.running.ranks import Ranks

LEASE = 0.6  # seconds


class Silent(Ranks):
    """One that is lost: it shows no pulse."""

    def beat(self) -> None:
        return


@pytest.fixture
def store() -> Any:
    return HashStore()


def test_each_piece_is_drawn_once(store: Any) -> None:
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def work(rank: int) -> None:
        for number in Ranks(store, rank, 3, LEASE).draw(100):
            drawn[rank].append(number)
            time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in drawn.values() for number in numbers) == list(range(100))
    assert all(drawn.values())


def test_what_a_lost_process_held_is_drawn_again(store: Any) -> None:
    """Once, by one of those that are left, after a lease; whatever its clock says meanwhile."""
    lost = Silent(store, 1, 2, LEASE).draw(4)
    assert [next(lost), next(lost)] == [0, 1]  # 0 is finished, 1 is held
    began = time.monotonic()
    assert list(Ranks(store, 0, 2, LEASE).draw(4)) == [2, 3, 1]
    assert time.monotonic() - began >= LEASE
    assert list(Ranks(store, 2, 2, LEASE).draw(4)) == []


def test_a_process_that_died_before_it_held_what_it_drew(store: Any) -> None:
    store.add("drawn", 1)
    assert list(Ranks(store, 0, 2, LEASE).draw(2)) == [1, 0]


def test_a_slow_process_keeps_what_it_holds(store: Any) -> None:
    slow = Ranks(store, 1, 2, LEASE).draw(2)
    assert next(slow) == 0
    drawn: list[int] = []
    other = threading.Thread(target=lambda: drawn.extend(Ranks(store, 0, 2, LEASE).draw(2)))
    other.start()
    time.sleep(3 * LEASE)
    assert drawn == [1]
    assert list(slow) == []
    other.join(timeout=10 * LEASE)
    assert not other.is_alive()
    assert drawn == [1]


def test_a_clock_that_jumps(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day plays no part."""
    monkeypatch.setattr(time, "time", lambda: 1e12 if time.monotonic() % 0.2 < 0.1 else 0.0)
    slow = Ranks(store, 1, 2, LEASE).draw(1)
    next(slow)
    other = Ranks(store, 0, 2, LEASE)
    robbed: list[int] = []
    thread = threading.Thread(target=lambda: robbed.extend(other.draw(1)), daemon=True)
    thread.start()
    time.sleep(2 * LEASE)
    assert robbed == []
    assert list(slow) == []
    thread.join(timeout=10 * LEASE)
    assert not thread.is_alive()


def test_jobs_are_counted_over_all(store: Any) -> None:
    ranks = [Ranks(store, rank, 2, LEASE) for rank in (0, 1)]
    assert [ranks[0].tell(2), ranks[1].tell(1), ranks[0].tell(0)] == [2, 3, 3]
    assert [rank.leads for rank in ranks] == [True, False]
