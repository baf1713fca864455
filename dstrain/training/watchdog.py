"""Detects that this rank no longer makes progress, prints its stacks, and then ends it.

Collectives wait for the slowest rank, and their own time-outs do not fire reliably, so a hung rank would stall a job until its
time limit. A thread checks the last sign of life; after one period of silence it prints rank, phase and all stacks, after a
second one it ends the process, which makes the other ranks' collectives fail and so ends the job. Costs one sleeping thread.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dstrain.log import logger

HANG_CODE = 86
"""Exit code of a rank that its watchdog ended."""


class Watchdog:
    """Expects `beat` at least every `seconds` while it is entered; 0 = never watches."""

    def __init__(self, seconds: float, *, rank: int = 0, end: Callable[[int], None] = os._exit) -> None:
        self.seconds = seconds
        self.rank = rank
        self._end = end
        self._phase = "starting"
        self._last = time.monotonic()
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str) -> None:
        """A sign of life. phase: what begins now, in words."""
        self._phase = phase
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat("starting")
        if self.seconds > 0:
            self._leave.clear()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        reported_beat: float | None = None
        while not self._leave.wait(min(self.seconds / 10, 5.0)):
            last = self._last
            silence = time.monotonic() - last
            if silence >= 2 * self.seconds and reported_beat == last:
                logger.critical(
                    "rank %d made no progress for %.0f seconds in phase: %s. It ends now; start again to resume",
                    self.rank, silence, self._phase,
                )  # fmt: skip
                sys.stderr.flush()
                self._end(HANG_CODE)
                return
            if silence >= self.seconds and reported_beat != last:
                reported_beat = last
                logger.error(
                    "rank %d made no progress for %.0f seconds in phase: %s. Its stacks follow; it ends after as long again",
                    self.rank, silence, self._phase,
                )  # fmt: skip
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
