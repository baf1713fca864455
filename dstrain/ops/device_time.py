"""How long a device works. A GPU is given work and does it later, so it takes its times itself."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""A place in the work of a device."""


def mark(device: torch.device) -> Mark:
    """The place behind all work that `device` has been given so far; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """What the work between two marks of one device took; waits until it is done."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event), "marks of two devices"
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
