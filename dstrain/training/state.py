"""The state of the trainer between two steps; JSON in the manifest of each checkpoint, bit for bit.

The engine's own state (weights, moments, schedule, averages) is beside it in the engine's files. Random numbers need no
state: they follow from (seed, step, rank).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from dstrain.batch import Batch, Metrics
from dstrain.config_base import Config
from dstrain.data.batching.plan import PlannedStep
from dstrain.engine.loss_totals import StepReport
from dstrain.errors import CheckpointError
from dstrain.storage.document import Count, DocumentFormat


class Window(Config):
    """Sums over the steps since the last training event, so that an event does not depend on interruptions.

    num_targets, denominator, loss_sum: over steps that were applied. sums, counts: the objective's metrics over these steps, by
    name; see `dstrain.batch.Metrics`. positions, filled: decoder positions of this rank's micro-batches, and how many of them are
    no padding. seconds, cpu_seconds: of steps only, without validation and saving; cpu_seconds are those of this process.
    """

    steps: Count = 0
    skipped: Count = 0
    num_targets: Count = 0
    denominator: Count = 0
    loss_sum: float = 0.0
    sums: dict[str, float] = Field(default_factory=dict)
    counts: dict[str, Count] = Field(default_factory=dict)
    positions: Count = 0
    filled: Count = 0
    seconds: NonNegativeFloat = 0.0
    cpu_seconds: NonNegativeFloat = 0.0

    def after(self, report: StepReport, batches: Sequence[Batch], seconds: float, cpu_seconds: float) -> Window:
        """With one more step and this rank's micro-batches of it."""
        applied = not report.skipped
        metrics = Metrics(self.sums, self.counts) + (report.metrics if applied else Metrics())
        changes = {
            "steps": self.steps + 1,
            "skipped": self.skipped + report.skipped,
            "num_targets": self.num_targets + (report.num_targets if applied else 0),
            "denominator": self.denominator + (report.denominator if applied else 0),
            "loss_sum": self.loss_sum + (report.loss * report.denominator if applied else 0.0),
            "sums": dict(metrics.sums),
            "counts": dict(metrics.counts),
            "positions": self.positions + sum(batch.target.tokens.numel() for batch in batches),
            "filled": self.filled + sum(int(batch.target.lengths.sum()) for batch in batches if batch.num_targets),
            "seconds": self.seconds + seconds,
            "cpu_seconds": self.cpu_seconds + cpu_seconds,
        }
        return self.model_copy(update=changes)

    def means(self) -> dict[str, float]:
        """Each metric per item of the micro-batches that report it."""
        return Metrics(self.sums, self.counts).means()


class TrainingState(Config):
    """The state of training after `step` steps.

    epoch, step_in_epoch: the position of the next step; epochs count from 1, and at the end of one this is (next epoch, 0).
    completed_step: the last step after which everything that was due (validation, bundles) had been done; behind `step` only
    in a checkpoint written in haste on a signal. best_metric: the criterion of best_score; None before there is one, and in
    checkpoints of an earlier version. elapsed_seconds: over all resumes. events_bytes: length of the event file.
    """

    step: Count = 0
    epoch: PositiveInt = 1
    step_in_epoch: Count = 0
    num_targets: Count = 0
    consecutive_skipped: Count = 0
    elapsed_seconds: NonNegativeFloat = 0.0
    completed_step: Annotated[int, Field(ge=-1)] = -1
    best_score: float | None = None
    best_step: Count | None = None
    best_metric: str | None = None
    validations_without_improvement: Count = 0
    events_bytes: Count = 0
    window: Window = Window()

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step closed an epoch."""
        return self.step > 0 and self.step_in_epoch == 0

    def after_step(self, planned: PlannedStep, report: StepReport, window: Window) -> TrainingState:
        """One step further."""
        return self.changed(
            step=self.step + 1,
            epoch=planned.epoch + 1 if planned.last_of_epoch else planned.epoch,
            step_in_epoch=0 if planned.last_of_epoch else planned.index + 1,
            num_targets=self.num_targets + report.num_targets,
            consecutive_skipped=self.consecutive_skipped + 1 if report.skipped else 0,
            window=window,
        )

    def after_validation(self, score: float, criterion: str) -> TrainingState:
        """With the counter of patience moved; only a strictly better, finite score is an improvement."""
        best = self.best_score
        if math.isfinite(score) and (best is None or (score < best if criterion.startswith(("loss", "nll/")) else score > best)):
            return self.changed(best_score=score, best_step=self.step, best_metric=criterion, validations_without_improvement=0)
        return self.changed(validations_without_improvement=self.validations_without_improvement + 1)

    def judged_by(self, criterion: str, before: str) -> TrainingState:
        """Without a best score if that is of another criterion. before: that of a state that does not name one."""
        if self.best_score is None or (self.best_metric or before) == criterion:
            return self
        return self.changed(best_score=None, best_step=None, best_metric=None, validations_without_improvement=0)

    def changed(self, **fields: Any) -> TrainingState:
        """With other values of some fields."""
        return self.model_copy(update=fields)


_FORMAT = DocumentFormat(
    TrainingState, "training state", CheckpointError, "resume with the version that wrote it, or start again from a bundle"
)


def load_state(content: Mapping[str, Any], path: Path) -> TrainingState:
    """The state whose `model_dump` is in the document `path`. CheckpointError if a field is missing, unknown or wrong."""
    state = _FORMAT.validate(dict(content), path)
    # A default is for the beginning of training, not for a checkpoint that lacks the field.
    lacking = TrainingState.model_fields.keys() - state.model_fields_set - {"best_metric"}
    lacking |= {f"window.{name}" for name in Window.model_fields.keys() - state.window.model_fields_set}
    if lacking:
        raise CheckpointError(f"{path} is not a valid {_FORMAT.name}: it lacks {', '.join(sorted(lacking))}; {_FORMAT.remedy}")
    return state
