"""A hang is seen, shown with its stack, and ended; progress of any kind keeps the dog quiet."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import time

import pytest

from dstrain.log import logger
from dstrain.training.watchdog import HANG_CODE, Watchdog
from tests.paths import ROOT


def test_a_hang_in_a_blocking_call_is_shown_with_its_stack_and_then_ended() -> None:
    script = """
        import time
        from dstrain.log import setup_logging
        from dstrain.training.watchdog import Watchdog

        def wait_for_a_rank_that_never_comes():
            time.sleep(60)

        setup_logging()
        with Watchdog(0.5, rank=3) as watchdog:
            watchdog.beat("training step 12")
            wait_for_a_rank_that_never_comes()
    """
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50, cwd=ROOT, check=False
    )
    assert time.monotonic() - begin < 50
    assert done.returncode == HANG_CODE
    assert "rank 3 made no progress for" in done.stderr
    assert "in phase: training step 12. Its stacks follow" in done.stderr
    assert "in wait_for_a_rank_that_never_comes" in done.stderr
    assert "It ends now; start again to resume" in done.stderr
    assert done.stderr.index("Its stacks follow") < done.stderr.index("It ends now")


def test_beats_keep_it_quiet_and_leaving_stops_it(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="dstrain")
    ended: list[int] = []
    with Watchdog(2.0, end=ended.append) as watchdog:
        for number in range(30):
            watchdog.beat(f"step {number}")
            time.sleep(0.1)
    assert ended == []
    assert caplog.text == ""
    assert watchdog._thread is None


def test_zero_seconds_never_watches() -> None:
    with Watchdog(0) as watchdog:
        assert watchdog._thread is None


def test_leaving_does_not_wait_for_a_period() -> None:
    begin = time.monotonic()
    with Watchdog(600):
        pass
    assert time.monotonic() - begin < 2
