"""Work done ahead in a background thread, a bounded number of items at a time.

Choice: a thread, not processes: it runs numpy and memory-mapped reading, which let other threads run, and an error
arrives as the object it was. A thread stuck in a dead file system does not hold up the end of the process. Cost: up to
`depth` + 1 finished items in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar("_T")


class _End:
    """The producer has stopped, of itself or with an error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetcher(Generic[_T]):
    """Iterates over `items`, at most `depth` of them ahead of the consumer; a context manager that stops the thread.

    An error inside `items` is raised, as it is, instead of the item. After the end, an error or `close` there are no
    more items.
    """

    def __init__(self, items: Iterable[_T], depth: int) -> None:
        self._items = items
        self._queue: SimpleQueue[_T | _End] = SimpleQueue()
        self._free_slots = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="dstrain-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, _End):
            self.close()
            raise item.error or StopIteration
        self._free_slots.release()
        return item

    def __enter__(self) -> Prefetcher[_T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the item under way, and wait a second for it at most; may be called again."""
        self._closed.set()
        self._free_slots.release()
        self._thread.join(timeout=1.0)

    def _produce(self) -> None:
        end = _End()
        try:
            for item in self._items:
                self._free_slots.acquire()
                if self._closed.is_set():
                    return
                self._queue.put(item)
        except BaseException as error:
            end = _End(error)
        finally:
            self._queue.put(end)
