"""Several ranks as threads of one process: real collectives' order and blocking without real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class _Meeting:
    barrier: threading.Barrier
    values: list[Any] = field(default_factory=list)


class ThreadRanks:
    """One rank of a `protocols.Ranks` whose members are threads; a rank that stays away breaks the others after 10 s."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def gather_objects(self, value: T) -> list[T]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait(10)
        gathered = list(self._meeting.values)
        self._meeting.barrier.wait(10)
        return gathered

    def barrier(self) -> None:
        self.gather_objects(None)

    def all_true(self, value: bool) -> bool:
        return all(self.gather_objects(value))

    def all_reduce_sums(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather_objects(list(values)), strict=True)]

    def broadcast_object(self, value: T) -> T:
        return self.gather_objects(value)[0]


def on_ranks(world_size: int, action: Callable[[ThreadRanks], T]) -> list[T | BaseException]:
    """What `action` returned or raised on every rank."""
    meeting = _Meeting(threading.Barrier(world_size), [None] * world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = action(ThreadRanks(rank, world_size, meeting))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
