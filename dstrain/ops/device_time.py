"""Time that a device spends on its work. A GPU works asynchronously, so it records the times itself."""

from __future__ import annotations

import time

import torch

Timestamp = float | torch.cuda.Event
"""A point in the work of a device."""


def timestamp(device: torch.device) -> Timestamp:
    """The end of all work that `device` has been given so far; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Timestamp, end: Timestamp) -> float:
    """The time of the work between two timestamps of one device; waits until it is done."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event), "timestamps of two devices"
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
