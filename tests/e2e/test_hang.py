"""A rank that no longer moves does not stall a job in silence."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dstrain.training.watchdog import HANG_CODE
from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, events, settings


@pytest.mark.slow
def test_a_rank_that_sleeps_is_noticed_by_the_others(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limits = "training={seed: 1, max_steps: 100000, hang_seconds: 4}"
    words = ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu"]
    ranks = Ranks([*words, *settings(*SMALL_DATA, *SMALL_TRAINING, limits)], 2, tmp_path / "log")
    try:
        ranks.wait_until(lambda: len(events(run, "checkpoint")) >= 1)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.processes[0].wait(60) == HANG_CODE
    finally:
        ranks.kill()
    said = (tmp_path / "log.0").read_text()
    assert "rank 0 made no progress for" in said
    assert "Its stacks follow" in said
    assert "in train_step" in said
    assert "It ends now; start again to resume" in said
