"""Signals that stop training: finish the step, write one checkpoint, exit with a code for the reason.

| signal | sent by | exit code |
|---|---|---|
| SIGUSR1, SIGTERM | Slurm before the time limit or a preemption, `kill` | 85: requeue me |
| SIGINT | Ctrl-C | 130; a second Ctrl-C ends at once, without a checkpoint |

A signal may reach only some ranks, or reach them at different steps, so the handler only sets a flag and the trainer adds
the flags up over the ranks after every step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

REQUEUE_CODE = 85
INTERRUPT_CODE = 130
HINT = b"\ninterrupted: finishing this step and saving a checkpoint; Ctrl-C again ends at once\n"


class Request(Enum):
    """Why training is to stop, with the exit code for the launcher."""

    PREEMPTED = REQUEUE_CODE
    INTERRUPTED = INTERRUPT_CODE


class StopSignals:
    """Catches the signals while it is entered, and puts the former handlers back afterwards."""

    def __init__(self) -> None:
        self.preempted = False
        self.interrupted = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.preempted = True
        elif self.interrupted:
            raise KeyboardInterrupt
        else:
            self.interrupted = True
            os.write(2, HINT)

    def flags(self) -> list[float]:
        """This rank's flags, to be summed over the ranks and given to `agreed`."""
        return [float(self.preempted), float(self.interrupted)]

    @staticmethod
    def agreed(sums: Sequence[float]) -> Request | None:
        """The request of all ranks together; requeueing wins, as the job manager does not wait."""
        preempted, interrupted = sums
        if preempted:
            return Request.PREEMPTED
        return Request.INTERRUPTED if interrupted else None
