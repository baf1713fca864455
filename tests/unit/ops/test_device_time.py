"""Times of a device: of a GPU by its own clock, read when its work is done."""

from __future__ import annotations

import time

import pytest
import torch

from dstrain.ops.device_time import seconds_between, timestamp


def test_a_cpu_has_worked_until_now() -> None:
    cpu = torch.device("cpu")
    begin = timestamp(cpu)
    time.sleep(0.02)
    assert 0.02 <= seconds_between(begin, timestamp(cpu)) < 10


class Event:
    """Of a GPU that takes 1,500 ms between two marks and is not done before someone waits."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.stream, self.done = "", False

    def record(self, stream: str) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: Event) -> float:
        assert end.done
        return 1500.0


def test_a_gpu_takes_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    begin, end = (timestamp(torch.device("cuda:1")) for _ in range(2))
    assert isinstance(begin, Event)
    assert isinstance(end, Event)
    assert begin.stream == end.stream == "the stream of cuda:1"
    assert not end.done
    assert seconds_between(begin, end) == 1.5
