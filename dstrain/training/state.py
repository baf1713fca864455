"""The state of the trainer between two steps; JSON in the manifest of each checkpoint, bit for bit.

The engine's own state (weights, moments, schedule, averages) is beside it in the engine's files. Random numbers need no
state: they follow from (seed, step, rank).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dstrain.batch import Batch, Metrics
from dstrain.data.batching.plan import PlannedStep
from dstrain.engine.step_report import StepReport
from dstrain.errors import CheckpointError


@dataclass(frozen=True)
class Window:
    """Sums over the steps since the last training event, so that an event does not depend on interruptions.

    num_targets, denominator, loss_sum: over steps that were applied. sums, counts: the objective's metrics over these steps, by
    name; see `dstrain.batch.Metrics`. positions, filled: decoder positions of this rank's micro-batches, and how many of them are
    no padding. seconds, cpu_seconds: of steps only, without validation and saving; cpu_seconds are those of this process.
    """

    steps: int = 0
    skipped: int = 0
    num_targets: int = 0
    denominator: int = 0
    loss_sum: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    positions: int = 0
    filled: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def after(self, report: StepReport, batches: Sequence[Batch], seconds: float, cpu_seconds: float) -> Window:
        """With one more step and this rank's micro-batches of it."""
        applied = not report.skipped
        metrics = Metrics(self.sums, self.counts) + (report.metrics if applied else Metrics())
        return Window(
            steps=self.steps + 1,
            skipped=self.skipped + report.skipped,
            num_targets=self.num_targets + (report.num_targets if applied else 0),
            denominator=self.denominator + (report.denominator if applied else 0),
            loss_sum=self.loss_sum + (report.loss * report.denominator if applied else 0.0),
            sums=dict(metrics.sums),
            counts=dict(metrics.counts),
            positions=self.positions + sum(batch.target.tokens.numel() for batch in batches),
            filled=self.filled + sum(int(batch.target.lengths.sum()) for batch in batches if batch.num_targets),
            seconds=self.seconds + seconds,
            cpu_seconds=self.cpu_seconds + cpu_seconds,
        )

    def means(self) -> dict[str, float]:
        """Each metric per item of the micro-batches that report it."""
        return Metrics(self.sums, self.counts).means()


@dataclass(frozen=True)
class TrainingState:
    """The state of training after `step` steps.

    epoch, step_in_epoch: the position of the next step; epochs count from 1, and at the end of one this is (next epoch, 0).
    completed_step: the last step after which everything that was due (validation, bundles) had been done; behind `step` only
    in a checkpoint written in haste on a signal. elapsed_seconds: over all resumes. events_bytes: length of the event file.
    """

    step: int = 0
    epoch: int = 1
    step_in_epoch: int = 0
    num_targets: int = 0
    consecutive_skipped: int = 0
    elapsed_seconds: float = 0.0
    completed_step: int = -1
    best_score: float | None = None
    best_step: int | None = None
    validations_without_improvement: int = 0
    events_bytes: int = 0
    window: Window = field(default_factory=Window)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step closed an epoch."""
        return self.step > 0 and self.step_in_epoch == 0

    def after_step(self, planned: PlannedStep, report: StepReport, window: Window) -> TrainingState:
        """One step further."""
        return replace(
            self,
            step=self.step + 1,
            epoch=planned.epoch + 1 if planned.last_of_epoch else planned.epoch,
            step_in_epoch=0 if planned.last_of_epoch else planned.index + 1,
            num_targets=self.num_targets + report.num_targets,
            consecutive_skipped=self.consecutive_skipped + 1 if report.skipped else 0,
            window=window,
        )

    def after_validation(self, score: float, *, higher_is_better: bool) -> TrainingState:
        """With the counter of patience moved; only a strictly better, finite score is an improvement."""
        best = self.best_score
        if math.isfinite(score) and (best is None or (score > best if higher_is_better else score < best)):
            return replace(self, best_score=score, best_step=self.step, validations_without_improvement=0)
        return replace(self, validations_without_improvement=self.validations_without_improvement + 1)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def load_state(content: Mapping[str, Any]) -> TrainingState:
    """The state that `to_json` gave. Raises CheckpointError if fields are missing or unknown.

    Earlier versions called a window's `counts` `targets`, or had none, when every step reported every sum.
    """
    expected, names = {entry.name for entry in fields(TrainingState)}, set(content)
    windows = {entry.name for entry in fields(Window)}
    window = dict(content["window"])
    if "counts" not in window:
        window["counts"] = window.pop("targets", dict.fromkeys(window.get("sums", {}), window.get("num_targets")))
    if names != expected or set(window) != windows:
        raise CheckpointError(
            f"the training state of this checkpoint has the fields {sorted(names)}, but this dstrain expects {sorted(expected)}: "
            "resume with the version that wrote it, or start again from a bundle"
        )
    return TrainingState(**{**content, "window": Window(**window)})
