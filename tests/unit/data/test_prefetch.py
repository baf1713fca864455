import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest

from dstrain.data.batching.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dstrain-prefetch"]


def wait_until(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_items_come_in_order_and_end() -> None:
    with Prefetcher(range(100), depth=3) as items:
        assert list(items) == list(range(100))
        assert list(items) == []
    assert not threads()


def test_no_more_is_made_ahead_than_asked_for() -> None:
    made: list[int] = []

    def produce() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    with Prefetcher(produce(), depth=3) as items:
        wait_until(lambda: len(made) == 4)  # three in the queue, one in the producer's hand
        time.sleep(0.05)
        assert len(made) == 4
        assert list(islice(items, 2)) == [0, 1]
        wait_until(lambda: len(made) == 6)
        time.sleep(0.05)
        assert len(made) == 6


class OddError(Exception):
    pass


def failing() -> Iterator[int]:
    yield 1
    yield 2
    raise OddError("third item")


def test_an_error_arrives_as_it_was_in_its_order() -> None:
    with Prefetcher(failing(), depth=8) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OddError, match=r"^third item$"):
            next(items)
        with pytest.raises(StopIteration):
            next(items)
    assert not threads()


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_closing_stops_the_thread_wherever_it_is(consumed: int) -> None:
    items = Prefetcher(count(), depth=2)
    assert list(islice(items, consumed)) == list(range(consumed))
    items.close()
    items.close()
    assert not threads()
    assert list(items) == []


def test_an_interrupt_in_the_consumer_stops_the_thread() -> None:
    with pytest.raises(KeyboardInterrupt), Prefetcher(count(), depth=2) as items:
        for item in items:
            if item == 10:
                raise KeyboardInterrupt
    assert not threads()


def test_the_producer_works_while_the_consumer_does() -> None:
    def slow() -> Iterator[int]:
        for number in range(10):
            time.sleep(0.02)
            yield number

    with Prefetcher(slow(), depth=10) as items:
        time.sleep(0.4)
        began = time.monotonic()
        assert list(items) == list(range(10))
        assert time.monotonic() - began < 0.1
