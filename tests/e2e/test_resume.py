"""Resume equals the uninterrupted run, bit for bit, wherever it was stopped: the losses of every step are compared."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, curve, events, settings

CASES = [
    pytest.param("zero1", 1, id="zero1-1rank"),
    pytest.param("zero3", 2, id="zero3-2ranks"),
    pytest.param("zero1", 2, id="zero1-2ranks", marks=pytest.mark.slow),
    pytest.param("zero2", 1, id="zero2-1rank", marks=pytest.mark.slow),
    pytest.param("zero2", 2, id="zero2-2ranks", marks=pytest.mark.slow),
    pytest.param("zero3", 1, id="zero3-1rank", marks=pytest.mark.slow),
]


def start(run: Path, data: Path, stage: str, num_ranks: int, *overrides: str) -> Ranks:
    chosen = settings(*SMALL_DATA, *SMALL_TRAINING, f"engine.deepspeed={stage}", *overrides)
    return Ranks(
        ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *chosen], num_ranks, run.with_suffix(".log")
    )


def finish(run: Path, data: Path, stage: str, num_ranks: int, *overrides: str) -> None:
    ranks = start(run, data, stage, num_ranks, *overrides)
    assert ranks.wait() == [0] * num_ranks, ranks.output()


@pytest.mark.parametrize(("stage", "num_ranks"), CASES)
def test_killed_and_resumed_equals_uninterrupted(stage: str, num_ranks: int, data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    finish(whole, data, stage, num_ranks)
    expected = curve(whole)
    assert [step for step, *_ in expected] == list(range(1, 15))
    epoch_ends = [event["step"] for event in events(whole, "valid")]
    assert 0 < epoch_ends[0] < 14, "the run is meant to cross an epoch boundary"

    broken = tmp_path / "broken"
    ranks = start(broken, data, stage, num_ranks)
    ranks.wait_until(lambda: len(events(broken, "checkpoint")) >= 2)
    ranks.kill()
    finish(broken, data, stage, num_ranks)
    assert curve(broken) == expected
    assert [event["loss"] for event in events(broken, "valid")] == [event["loss"] for event in events(whole, "valid")]
    assert (broken / "bundles" / "last" / "model.safetensors").read_bytes() == (
        whole / "bundles" / "last" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_of_a_save(data: Path, tmp_path: Path) -> None:
    """kill -9 while a checkpoint is being written, again and again, until the run is through."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    always = "checkpoint={unit: steps, every: 1, keep_checkpoints: 2, keep_bundles: 1}"
    finish(whole, data, "zero2", 2, always)
    moments = random.Random(7)
    kills = 0
    while kills < 5:
        before = len(events(broken, "checkpoint"))
        ranks = start(broken, data, "zero2", 2, always)
        ranks.wait_until(
            lambda seen=before: (
                (len(events(broken, "checkpoint")) > seen and any((broken / "checkpoints").glob("*.tmp")))
                or len(events(broken, "end")) > 0
            )
        )
        if moments.random() < 0.5:
            pause = moments.random() * 0.02
            ranks.processes[0].poll()
            signal.sigtimedwait([], pause)
        ranks.kill()
        kills += 1
        if events(broken, "end"):
            break
    finish(broken, data, "zero2", 2, always)
    assert curve(broken) == curve(whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 85), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)], ids=["usr1", "ctrl-c"]
)
def test_a_signal_saves_at_the_step_boundary_and_resume_is_exact(number: int, code: int, data: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(whole, data, "zero1", 1)
    ranks = start(stopped, data, "zero1", 1)
    ranks.wait_until(lambda: len(events(stopped, "train")) >= 4)
    ranks.kill(number)
    assert ranks.wait() == [code], ranks.output()
    assert "Traceback" not in ranks.output()
    steps = len(events(stopped, "train"))
    assert events(stopped, "checkpoint")[-1]["step"] == steps < 14
    finish(stopped, data, "zero1", 1)
    assert curve(stopped) == curve(whole)


def test_a_rank_killed_ends_the_others_with_one_message(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start(run, data, "zero1", 2, "training.max_steps=4000")
    ranks.wait_until(lambda: len(events(run, "checkpoint")) >= 1)
    ranks.processes[1].send_signal(signal.SIGKILL)
    codes = ranks.wait(timeout=60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1
    assert "Traceback" not in ranks.output()
    assert "rank" in ranks.output()
    assert "checkpoints/step_" in ranks.output()
