"""The loop with stand-ins below it: what is due when, how it ends, and that a resumed run cannot be told from a straight one."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.errors import CheckpointError, TrainingError
from dstrain.training.config import CheckpointConfig, ValidationConfig
from dstrain.training.events import read_events
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.training import fakes
from tests.unit.training.fakes import Setup

EPOCHS = {"unit": "epochs", "every": 1}
VOLATILE = {"time", "seconds", "cpu_seconds", "tokens_per_second", "eta_seconds", "elapsed_seconds"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing bytes to the disk is tested with the checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Crash(BaseException):
    """kill -9: nothing between the step and the test runs, but for the closing of files."""


def crash_at(setup: Setup, step: int) -> None:
    def strike(now: int) -> None:
        if now == step:
            raise Crash

    setup.engine.before_step = strike


def what_happened(setup: Setup) -> list[dict[str, Any]]:
    """All training and validation events without what depends on the clock."""
    events = read_events(setup.directory / "events.jsonl")
    return [{k: v for k, v in event.items() if k not in VOLATILE} for event in events if event["kind"] in {"train", "valid"}]


def bundles(setup: Setup) -> dict[str, Any]:
    """Name -> content of every bundle."""
    return {path.parent.name: json.loads(path.read_text()) for path in (setup.directory / "bundles").glob("*/weight.json")}


def straight(directory: Path, **limits: Any) -> Setup:
    setup = Setup(directory, **limits)
    assert setup.run() == 0
    return setup


def test_a_run_reports_every_step_and_writes_what_is_due(tmp_path: Path) -> None:
    setup = straight(tmp_path)
    assert [step for step, _ in setup.losses()] == list(range(1, 21))
    assert setup.validated == [5, 10, 15, 20]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000015", "step_00000020"]
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == ["best", "last", "step_00000020"]
    assert setup.events("end")[0]["reason"] == "max_steps = 20"


def test_epochs_end_where_the_plan_says(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_steps=None, max_epochs=3)
    setup.validation = ValidationConfig(**EPOCHS, generation=None)
    setup.checkpoint = CheckpointConfig(unit="epochs", every=2)
    assert setup.run() == 0
    assert setup.validated == [7, 14, 21]
    assert [(event["epoch"], event["step"]) for event in setup.events("valid")] == [(1, 7), (2, 14), (3, 21)]
    assert [event["step"] for event in setup.events("checkpoint")] == [14, 21]
    assert [event["epoch"] for event in setup.events("train")] == [1] * 7 + [2] * 7 + [3] * 7


def test_events_carry_the_window_since_the_last_one(tmp_path: Path) -> None:
    whole, sparse = straight(tmp_path / "whole"), Setup(tmp_path / "sparse")
    sparse.log_every = 4
    sparse.run()
    every, some = whole.events("train"), sparse.events("train")
    ends = [4, 5, 8, 10, 12, 15, 16, 20]  # every fourth step, and before each validation
    assert [event["step"] for event in some] == ends
    for begin, end, event in zip([0, *ends], ends, some, strict=False):
        window = every[begin:end]
        targets = sum(each["num_targets"] for each in window)
        assert event["num_targets"] == targets
        assert event["steps"] == end - begin
        assert event["loss"] == pytest.approx(sum(each["loss"] * each["num_targets"] for each in window) / targets, rel=1e-12)
        assert event["nll"] == pytest.approx(event["loss"] / 2, rel=1e-12)
        assert event["other"] == pytest.approx(event["loss"] / 4, rel=1e-12)
        assert (event["learning_rate"], event["grad_norm"]) == (window[-1]["learning_rate"], window[-1]["grad_norm"])
        assert event["tokens_per_second"] == pytest.approx(targets / event["seconds"])


def test_the_last_steps_are_reported_too(tmp_path: Path) -> None:
    setup = Setup(tmp_path / "end", max_steps=14)
    setup.log_every = 100
    setup.validation = setup.validation.model_copy(update={"every": 12})
    setup.run()
    assert [(event["step"], event["steps"]) for event in setup.events("train")] == [(12, 12), (14, 2)]
    kinds = [event["kind"] for event in read_events(setup.directory / "events.jsonl")]
    assert [kind for kind in kinds if kind in {"train", "valid"}] == ["train", "valid", "train", "valid"]


def test_the_steps_before_a_failure_are_reported(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.log_every = 100
    setup.engine.loss_of = lambda step, loss: float("nan") if step == 9 else loss
    with pytest.raises(TrainingError, match="step 9 failed"):
        setup.run()
    assert [(event["step"], event["steps"]) for event in setup.events("train")] == [(5, 5), (8, 3)]


@pytest.mark.parametrize("step", range(1, 21))
@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_a_crash_in_any_step_leaves_no_trace_after_resume(tmp_path: Path, step: int, unit: str) -> None:
    def setup_in(directory: Path) -> Setup:
        setup = Setup(directory)
        setup.log_every = 3
        if unit == "epochs":
            setup.validation = ValidationConfig(**EPOCHS, generation=None)
            setup.checkpoint = CheckpointConfig(**EPOCHS)
        return setup

    whole, broken = setup_in(tmp_path / "whole"), setup_in(tmp_path / "broken")
    assert whole.run() == 0
    crash_at(broken, step)
    with pytest.raises(Crash):
        broken.run()
    assert broken.run() == 0
    assert what_happened(broken) == what_happened(whole)
    assert bundles(broken) == bundles(whole)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 12, 15, 19])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_boundary_and_leaves_no_trace_after_resume(
    tmp_path: Path, step: int, number: int, code: int
) -> None:
    whole, stopped = straight(tmp_path / "whole"), Setup(tmp_path / "stopped")
    stopped.engine.before_step = lambda now: os.kill(os.getpid(), number) if now == step else None
    assert stopped.run() == code
    assert stopped.engine.steps == step
    assert stopped.events("checkpoint")[-1]["step"] == step
    assert stopped.events("end")[-1]["exit_code"] == code
    assert step not in stopped.validated, "a signal does not wait for validation"
    assert stopped.run() == 0
    assert what_happened(stopped) == what_happened(whole)
    assert bundles(stopped) == bundles(whole)


def test_a_signal_during_validation_breaks_it_off_and_the_resumed_run_repeats_it_whole(tmp_path: Path) -> None:
    whole, stopped = straight(tmp_path / "whole"), Setup(tmp_path / "stopped")
    looks = stopped.validate

    def long_validation(interrupted: Any) -> dict[str, float] | None:
        if stopped.engine.steps == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return looks(interrupted)

    stopped.validate = long_validation  # type: ignore[method-assign]
    assert stopped.run() == 85
    assert stopped.validated == [5]
    stopped.validate = looks  # type: ignore[method-assign]
    assert stopped.run() == 0
    assert what_happened(stopped) == what_happened(whole)
    assert bundles(stopped) == bundles(whole)


def test_a_crash_after_a_resumed_validation_does_not_report_it_twice(tmp_path: Path) -> None:
    whole, stopped = straight(tmp_path / "whole"), Setup(tmp_path / "stopped")
    stopped.engine.before_step = lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == 10 else None
    assert stopped.run() == 85
    trainer = stopped.trainer()
    crash_at(stopped, 13)
    with pytest.raises(Crash):
        trainer.run()
    assert stopped.run() == 0
    assert what_happened(stopped) == what_happened(whole)


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_put_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    setup = Setup(tmp_path)

    def twice(now: int) -> None:
        if now == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    setup.engine.before_step = twice
    with pytest.raises(KeyboardInterrupt):
        setup.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("finishing this step and saving a checkpoint; Ctrl-C again ends at once") == 1
    assert [event["step"] for event in setup.events("checkpoint")] == [5]


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    def setup_in(directory: Path) -> Setup:
        setup = Setup(directory, max_steps=100)
        setup.validation = ValidationConfig(unit="steps", every=5, generation=None, patience=3)
        setup.scores = lambda step, weight: {5: 3.0, 10: 2.0}.get(step, 2.0)
        return setup

    whole, broken = setup_in(tmp_path / "whole"), setup_in(tmp_path / "broken")
    assert whole.run() == 0
    assert whole.engine.steps == 25
    assert whole.events("end")[0]["reason"] == "patience = 3: loss has not improved since step 10"
    crash_at(broken, 23)
    with pytest.raises(Crash):
        broken.run()
    assert broken.run() == 0
    assert broken.engine.steps == 25
    assert bundles(whole)["best"]["step"] == bundles(broken)["best"]["step"] == 10


def test_more_is_better_for_bleu(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.validation = ValidationConfig(unit="steps", every=5, metric="bleu")
    bleu = {5: 10.0, 10: 30.0, 15: 20.0, 20: 30.0}
    setup.validate = lambda interrupted: {"loss": 1.0, "bleu": bleu[setup.engine.steps]}  # type: ignore[method-assign]
    setup.run()
    assert bundles(setup)["best"]["step"] == 10
    assert setup.events("end")[0]["best_score"] == 30.0


def test_the_sanity_validation_comes_before_the_first_step_and_is_never_best(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.validation = ValidationConfig(unit="steps", every=5, generation=None, run_sanity_validation=True)
    setup.scores = lambda step, weight: float(step)
    crash_at(setup, 7)
    with pytest.raises(Crash):
        setup.run()
    setup.run()
    assert setup.validated == [0, 5, 10, 15, 20]
    assert bundles(setup)["best"]["step"] == 5


def test_hours_count_over_all_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("dstrain.training.trainer.time.monotonic", lambda: now[0])
    setup = Setup(tmp_path, max_steps=None, max_hours=1.0)

    def a_step_takes_six_minutes(step: int) -> None:
        now[0] += 360
        if step == 6 and now[0] < 4000:
            os.kill(os.getpid(), signal.SIGUSR1)

    setup.engine.before_step = a_step_takes_six_minutes
    assert setup.run() == 85
    now[0] += 100_000
    trainer = setup.trainer()
    setup.engine.before_step = a_step_takes_six_minutes
    assert trainer.run() == 0
    assert setup.engine.steps == 10
    assert setup.events("end")[0]["reason"] == "max_hours = 1.0"
    assert setup.events("end")[0]["elapsed_seconds"] == pytest.approx(3600)


def test_a_finished_run_started_again_does_nothing_more(tmp_path: Path) -> None:
    setup = straight(tmp_path)
    before, kept = what_happened(setup), bundles(setup)
    assert setup.run() == 0
    assert setup.engine.steps == 20
    assert (what_happened(setup), bundles(setup)) == (before, kept)


def test_a_finished_run_goes_on_where_the_limit_is_raised(tmp_path: Path) -> None:
    whole, longer = straight(tmp_path / "whole", max_steps=33), straight(tmp_path / "longer", max_steps=20)
    longer.training = whole.training
    assert longer.run() == 0
    assert what_happened(longer) == what_happened(whole)


def test_the_newest_step_bundles_are_kept(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.checkpoint = CheckpointConfig(unit="steps", every=5, keep_bundles=3)
    setup.run()
    assert {name for name in bundles(setup) if name.startswith("step_")} == {"step_00000010", "step_00000015", "step_00000020"}
    assert bundles(setup)["last"] == bundles(setup)["step_00000020"]


def test_a_loss_that_is_not_finite_ends_training_and_names_its_examples(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.engine.loss_of = lambda step, loss: float("nan") if step == 8 else loss
    with pytest.raises(TrainingError, match=r"step 8 failed \(epoch 2, step 0 of it.*the loss is nan.*step_00000005"):
        setup.run()
    (failure,) = setup.events("failure")
    assert (failure["epoch"], failure["index"], failure["examples"]) == (2, 0, [200])
    assert [step for step, _ in setup.losses()] == list(range(1, 8))


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_training(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_steps=500)
    setup.log_every = 10
    setup.validation = setup.validation.model_copy(update={"every": 10})
    setup.engine.skipped = lambda step: step in {3, 4} or step > 20
    setup.engine.loss_of = lambda step, loss: float("inf") if step in {3, 4} or step > 20 else loss
    with pytest.raises(TrainingError, match=r"100 updates in a row were skipped until step 120.*optimizer.learning_rate"):
        setup.run()
    assert [event["skipped"] for event in setup.events("train")][:3] == [2, 0, 10]
    assert setup.events("train")[0]["num_targets"] == sum(10 + place for place in (0, 1, 4, 5, 6)) + sum((20, 21, 22))
    assert setup.events("train")[2]["loss"] is None


def test_another_rank_that_ended_is_one_sentence_with_the_last_checkpoint(tmp_path: Path) -> None:
    setup = Setup(tmp_path)

    def lost(step: int) -> None:
        if step == 9:
            raise RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    setup.engine.before_step = lost
    with pytest.raises(
        TrainingError, match=r"another rank ended unexpectedly.*last checkpoint is .*step_00000005.*again to resume"
    ):
        setup.run()


def test_a_defect_keeps_its_own_error(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.engine.loss_of = lambda step, loss: [][step]
    with pytest.raises(IndexError):
        setup.run()
    setup = Setup(tmp_path / "other")
    setup.engine.loss_of = lambda step, loss: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        setup.run()


def test_a_full_disk_while_a_bundle_is_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = straight(tmp_path, max_steps=10)

    def full(directory: Path, weights: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        directory.mkdir(exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    kept = bundles(setup)
    setup.training = setup.training.model_copy(update={"max_steps": 20})
    monkeypatch.setattr(fakes, "save_bundle", full)
    with pytest.raises(TrainingError, match=r"writing the bundle .*step_00000015 failed.*No space left on device"):
        setup.run()
    assert bundles(setup) == kept
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == ["best", "last", "step_00000010"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert setup.run() == 0


def test_unusable_checkpoints_are_never_silently_trained_over(tmp_path: Path) -> None:
    setup = straight(tmp_path)
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable"):
        setup.run()


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(tmp_path: Path, asked: int) -> None:
    class Unhooked(fakes.StopSignals):
        """Threads cannot catch signals."""

        def __enter__(self) -> fakes.StopSignals:
            return self

    def run(ranks: ThreadRanks) -> tuple[int, int]:
        setup = Setup(tmp_path if ranks.rank == 0 else tmp_path / "nowhere")
        trainer = setup.trainer()
        signals = Unhooked()
        trainer.ranks, trainer.signals = ranks, signals
        trainer.checkpoints.ranks = trainer.bundles.ranks = ranks
        trainer.checkpoints.directory = tmp_path / "checkpoints"

        def ask(step: int) -> None:
            signals.preempted |= step == 7 and ranks.rank == asked

        setup.engine.before_step, setup.engine.rank = ask, ranks.rank
        return trainer.run(), setup.engine.steps

    assert on_ranks(2, run) == [(85, 7), (85, 7)]
    assert json.loads((tmp_path / "checkpoints" / "step_00000007" / "manifest.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "FILE"), "the disk is full at FILE; the last checkpoint is"),
        (RuntimeError("Connection closed by peer [10.0.0.1]"), "another rank ended unexpectedly"),
    ],
)
def test_a_full_disk_or_a_lost_rank_is_an_event_too(tmp_path: Path, error: Exception, message: str) -> None:
    setup = Setup(tmp_path)

    def strike(step: int) -> None:
        if step == 8:
            raise error

    setup.engine.before_step = strike
    with pytest.raises(TrainingError, match=message) as caught:
        setup.run()
    assert [(event["step"], event["message"]) for event in setup.events("failure")] == [(7, str(caught.value))]
