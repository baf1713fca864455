"""What a person sees of a training on a terminal and in a log."""

from __future__ import annotations

import math
import re
import time

import pytest

from dstrain.log import setup_logging
from dstrain.training.display import Display, train_notes, valid_scores
from tests.unit.test_progress import start_terminal
from tests.unit.training.test_reporting import TRAIN, VALID

LARGE = {
    **VALID, "step": 1_200_000, "best_step": 1_200_000, "weights": "ema", "perplexity": 1234.5, "bleu": 21.54321, "chrf": 48.5,
}  # fmt: skip


def test_notes_begin_with_the_most_important() -> None:
    assert train_notes(TRAIN) == [
        "loss 3.250", "2,950 tokens/s", "perplexity 20.08", "epoch 2", "lr 1.50e-03", "norm 0.75",
    ]  # fmt: skip
    assert train_notes({**TRAIN, "loss": math.nan, "skipped": 3})[:3] == ["loss not finite", "3 skipped", "2,950 tokens/s"]
    assert train_notes({**TRAIN, "perplexity": 1.5e304})[2] == "perplexity 1.5e+304"


def test_a_distillation_shows_what_it_learns_from_the_teacher() -> None:
    notes = train_notes({**TRAIN, "hard": 3.1, "kd": 0.25, "agreement": 0.5, "selected": 0.5})
    assert notes[2:4] == ["kd 0.250 on 50%", "agreement 50.0%"]


def test_steps_on_the_students_own_samples_are_distinguished() -> None:
    own = {"on_policy_nll": 2.0, "on_policy_kd": 0.125, "on_policy_agreement": 0.25}
    mixed = train_notes({**TRAIN, "kd": 0.5, "agreement": 0.5, "selected": 0.5, "on_policy": 0.3, **own})
    assert mixed[2:7] == [
        "kd 0.500 on 50%", "agreement 50.0%", "on-policy kd 0.125", "on-policy agreement 25.0%", "perplexity 20.08",
    ]  # fmt: skip
    alone = train_notes({**TRAIN, "nll": math.nan, "perplexity": math.nan, "on_policy": 1.0, **own})
    assert not any("perplexity" in note for note in alone)


def test_scores_of_a_validation() -> None:
    assert valid_scores(VALID) == ["loss 3.000", "bleu 21.50", "perplexity 12", "epoch 2", "4.0 s"]


def test_a_log_has_a_line_for_each_event_and_one_a_minute_between_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    setup_logging()
    display = Display(1600)
    display.write({"kind": "start", "step": 0, "time": 0.0})
    for now[0], step in ((30.0, 48), (61.0, 49)):
        display.move_to(step, 7200.0)
    now[0] = 125.0
    display.write(TRAIN)
    display.write(VALID)
    display.write({"kind": "checkpoint", "step": 50, "path": "x"})
    display.close()
    first, *others = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert re.fullmatch(r"training: 49/1,600 steps  [\d,.]+ steps/s  ETA 2:00:00", first)
    assert others == [
        "training: 50/1,600 steps  loss 3.250  2,950 tokens/s  perplexity 20.08  epoch 2  lr 1.50e-03  norm 0.75  ETA 1:02:05",
        "valid step 50 (best)  loss 3.000  bleu 21.50  perplexity 12  epoch 2  4.0 s",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_keeps_validations_above_the_bar_on_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = start_terminal(monkeypatch, width)
    display = Display(100)
    display.write({"kind": "resume", "step": 40, "time": 0.0})
    display.write(TRAIN)
    display.write(VALID)
    display.write(LARGE)
    display.close()
    lines = terminal.lines()
    assert all(len(line) <= width for line in lines)
    first, second = [line[9:] for line in lines if "valid step" in line]
    assert first.startswith("valid step 50 (best)  loss 3.000  bleu 21.50  perplexity 12  epoch 2")
    assert second.startswith("valid step 1,200,000 (EMA, best)  loss 3.000  bleu 21.54")
    assert ("chrf 48.50" in second) == (width == 120)
    assert any(line.startswith("training ━") and "50/100 steps  loss 3.250  2,950 tokens/s" in line for line in lines)
