"""The training state survives JSON bit for bit, and limits are read from it only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dstrain.batch import Metrics
from dstrain.engine.loss_totals import StepReport
from dstrain.errors import CheckpointError
from dstrain.training.config import TrainingConfig, ValidationConfig
from dstrain.training.limits import reason_to_stop, remaining_seconds
from dstrain.training.state import TrainingState, Window, load_state

PATH = Path("step_00000007/manifest.json")
VALIDATION = ValidationConfig(patience=4)


def test_json_and_back_is_the_same_state() -> None:
    window = Window(
        steps=3,
        skipped=1,
        num_targets=99,
        denominator=7,
        loss_sum=0.1 + 0.2,
        sums={"nll": 1 / 3},
        counts={"nll": 3},
        seconds=1e-9,
    )
    state = TrainingState(step=7, epoch=2, elapsed_seconds=1e17 / 3, best_score=2 / 3, best_step=5, window=window)
    assert load_state(json.loads(json.dumps(state.model_dump())), PATH) == state


def test_a_window_keeps_a_loss_per_sentence_separate_from_sums_per_token() -> None:
    """Two applied steps of 10 tokens in 2 sentences and 90 tokens in 3, and a skipped one that counts nowhere."""
    rest = {"grad_norm": 1.0, "learning_rate": 0.1}
    reports = [
        StepReport(step=1, loss=5.0, num_targets=10, denominator=2, metrics=Metrics.over(10, {"nll": 40.0, "kl": 10.0}), **rest),
        StepReport(2, math.nan, 50, 9, skipped=True, metrics=Metrics.over(50, {"nll": math.nan, "kl": 50.0}), **rest),
        StepReport(step=2, loss=3.0, num_targets=90, denominator=3, metrics=Metrics.over(90, {"nll": 180.0, "kl": 45.0}), **rest),
    ]
    window = Window()
    for report in reports:
        window = window.after(report, [], 1.0, 1.0)
    assert (window.steps, window.skipped, window.num_targets, window.denominator) == (3, 1, 100, 5)
    assert window.loss_sum == 5.0 * 2 + 3.0 * 3
    assert window.sums == {"nll": 4.0 * 10 + 2.0 * 90, "kl": 1.0 * 10 + 0.5 * 90}
    assert window.means() == {"nll": 2.2, "kl": 0.55}


def test_a_sum_is_divided_by_the_targets_of_the_steps_that_report_it() -> None:
    rest: dict[str, float] = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    window = Window()
    for number, sums in ((10, {"nll": 40.0, "on_policy": 0.0}), (30, {"on_policy_nll": 60.0, "on_policy": 30.0})):
        report = StepReport(step=1, num_targets=number, denominator=number, metrics=Metrics.over(number, sums), **rest)
        window = window.after(report, [], 1.0, 1.0)
    assert window.means() == {"nll": 4.0, "on_policy": 0.75, "on_policy_nll": 2.0}
    state = TrainingState(window=window)
    assert load_state(json.loads(json.dumps(state.model_dump())), PATH) == state


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"unknown": 1}, "unknown: unknown key"),
        ({"step": -1}, "step: input should be greater than or equal to 0, not -1"),
        ({"step": "7"}, "step: input should be a valid integer, not '7'"),
        ({"epoch": 0}, "epoch: input should be greater than 0, not 0"),
        ({"events_bytes": 1.5}, "events_bytes: "),
        ({"elapsed_seconds": None}, "elapsed_seconds: input should be a valid number, not null"),
        ({"window": []}, "window: input should be an object"),
        ({"window": {"steps": 1}}, "it lacks window.counts, window.cpu_seconds, "),
        ({"window": {**Window().model_dump(), "counts": {"nll": -3}}}, "window.counts.nll: input should be greater"),
    ],
)
def test_a_wrong_state_is_one_message(change: dict[str, object], problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_state({**TrainingState().model_dump(), **change}, PATH)
    assert str(caught.value).startswith(f"{PATH} is not a valid training state: {problem}")
    assert str(caught.value).endswith("; resume with the version that wrote it, or start again from a bundle")


@pytest.mark.parametrize("field", sorted(TrainingState.model_fields.keys() - {"best_metric"}))
def test_a_field_that_is_missing_is_no_default(field: str) -> None:
    content = TrainingState().model_dump()
    del content[field]
    with pytest.raises(CheckpointError, match=f"{PATH} is not a valid training state: it lacks .*{field}"):
        load_state(content, PATH)


def test_the_first_limit_reached_ends_training() -> None:
    config = TrainingConfig(max_steps=10, max_epochs=2, max_hours=0.5)
    assert reason_to_stop(config, VALIDATION, TrainingState(step=9, epoch=2, step_in_epoch=3, elapsed_seconds=1799)) is None
    assert reason_to_stop(config, VALIDATION, TrainingState(step=10, epoch=2)) == "max_steps = 10"
    assert reason_to_stop(config, VALIDATION, TrainingState(step=9, epoch=3)) == "max_epochs = 2"
    assert reason_to_stop(config, VALIDATION, TrainingState(step=9, elapsed_seconds=1800)) == "max_hours = 0.5"
    worse = TrainingState(step=9, validations_without_improvement=4, best_step=5)
    assert reason_to_stop(config, VALIDATION, worse) == "patience = 4: loss has not improved since step 5"
    assert reason_to_stop(config, ValidationConfig(), worse) is None


def test_the_time_left_follows_the_nearest_limit() -> None:
    state = TrainingState(step=100, epoch=2, step_in_epoch=20, elapsed_seconds=1000.0)
    assert remaining_seconds(TrainingConfig(max_steps=150), state) == pytest.approx(500.0)
    assert remaining_seconds(TrainingConfig(max_epochs=3), state) == pytest.approx((3 * 80 - 100) * 10.0)
    assert remaining_seconds(TrainingConfig(max_hours=1.0), state) == pytest.approx(2600.0)
    assert remaining_seconds(TrainingConfig(max_hours=1.0, max_steps=150), state) == pytest.approx(500.0)
    assert remaining_seconds(TrainingConfig(max_epochs=3), state.changed(epoch=1, step_in_epoch=100)) is None
    assert remaining_seconds(TrainingConfig(max_steps=150), TrainingState()) is None
    assert remaining_seconds(TrainingConfig(max_steps=50), state) == 0.0


def test_only_strictly_better_scores_improve() -> None:
    state = TrainingState(step=5).after_validation(2.0, criterion="loss")
    assert (state.best_score, state.best_step, state.validations_without_improvement) == (2.0, 5, 0)
    same = state.changed(step=6).after_validation(2.0, criterion="loss")
    assert (same.best_step, same.validations_without_improvement) == (5, 1)
    better = same.changed(step=7).after_validation(1.9, criterion="loss")
    assert (better.best_score, better.best_step, better.validations_without_improvement) == (1.9, 7, 0)
    assert state.changed(step=8).after_validation(2.1, criterion="bleu").best_step == 8


def criterion_of(**section: Any) -> str:
    return ValidationConfig.model_validate(section).criterion


def test_a_best_score_is_of_one_criterion() -> None:
    state = TrainingState(step=5).after_validation(2.0, criterion="loss").changed(validations_without_improvement=3)
    assert state.judged_by("loss", before="bleu") is state
    other = state.judged_by("bleu", before="loss")
    assert (other.best_score, other.best_step, other.best_metric, other.validations_without_improvement) == (None, None, None, 0)
    chinese = TrainingState(step=5).after_validation(1.0, criterion=criterion_of(metric="bleu", tokenize="zh"))
    assert chinese.judged_by(criterion_of(metric="bleu", tokenize="zh", lowercase=False), before="") is chinese
    for change in ({"tokenize": "char"}, {"tokenize": "zh", "lowercase": True}):
        assert chinese.judged_by(criterion_of(metric="bleu", **change), before="").best_score is None
    assert criterion_of(metric="loss", tokenize="zh", lowercase=True) == "loss"
    assert criterion_of(metric="chrf", tokenize="zh") == criterion_of(metric="chrf")
    assert criterion_of(metric="rouge_l", rouge="plain", lowercase=True) == "rouge_l plain"
    assert criterion_of(metric="rouge_l", rouge="stemmed") == "rouge_l stemmed"
    earlier = state.changed(best_metric=None)
    assert earlier.judged_by("loss", before="loss") is earlier
    assert earlier.judged_by("bleu", before="loss").best_score is None


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_never_best(score: float) -> None:
    state = TrainingState(step=5).after_validation(score, criterion="loss")
    assert (state.best_score, state.best_step, state.validations_without_improvement) == (None, None, 1)
    assert state.after_validation(1.0, criterion="loss").best_score == 1.0


def test_every_reported_sum_adds_up_over_the_applied_steps_of_a_window() -> None:
    window = Window()
    for sums, targets, skipped in (
        ({"kd": 20.0, "selected": 5.0}, 10, False),
        ({"kd": 90.0, "selected": 10.0}, 10, True),
        ({"kd": 30.0, "selected": 3.0}, 30, False),
    ):
        report = StepReport(
            step=1,
            loss=3.0,
            num_targets=targets,
            denominator=targets,
            grad_norm=1.0,
            learning_rate=0.1,
            skipped=skipped,
            metrics=Metrics.over(targets, sums),
        )
        window = window.after(report, [], 0.1, 0.1)
    assert window.sums == {"kd": pytest.approx(50.0), "selected": pytest.approx(8.0)}
    assert (window.num_targets, window.skipped) == (40, 1)
