"""One stream of events, many readers: the event file, the display, and the trackers of `trackers`.

Only rank 0 reports; the other ranks hold a `Reporter` without readers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dstrain.training.config import ReportingConfig
from dstrain.training.display import Display
from dstrain.training.events import Event, EventFile
from dstrain.training.trackers import start_trackers


class Sink(Protocol):
    """A reader of events."""

    def write(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Reporter:
    """Gives every event its time and hands it to the event file and the sinks; the display also hears of every step."""

    def __init__(self, file: EventFile | None = None, sinks: Sequence[Sink] = (), display: Display | None = None) -> None:
        self._file = file
        self._display = display
        self._sinks = [*sinks, *([] if display is None else [display])]

    def emit(self, kind: str, step: int, **fields: Any) -> None:
        """Report one event; the fields are those of `events`."""
        if self._file is None:
            return
        event = {"time": time.time(), "kind": kind, "step": step, **fields}
        self._file.append(event)
        for sink in self._sinks:
            sink.write(event)

    def step_done(self, step: int, eta_seconds: float | None) -> None:
        """Show how far training is, event or not."""
        if self._display is not None:
            self._display.move_to(step, eta_seconds)

    def sync(self) -> int:
        """Force the event file to the disk; its length in bytes, 0 if this rank has none."""
        return self._file.sync() if self._file else 0

    def cut(self, length: int) -> None:
        """Forget the events after `length` bytes."""
        if self._file:
            self._file.cut(length)

    def close(self) -> None:
        """Close file and sinks."""
        for sink in self._sinks:
            sink.close()
        if self._file:
            self._file.close()


def build_reporter(directory: Path, config: ReportingConfig, *, rank: int, total_steps: int | None, run_id: str) -> Reporter:
    """The reporter of a run; silent on ranks other than 0. run_id: lets wandb continue the same run after a resume."""
    if rank != 0:
        return Reporter()
    trackers = start_trackers(config, directory, run_id)
    return Reporter(EventFile(directory / "events.jsonl"), trackers, Display(total_steps))
