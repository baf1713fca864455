"""Settings that are counted in steps, compared with the number of steps that the run is planned to have. Torch-free.

A setting beyond the end of the run cannot have its effect. Where the result is surely unwanted the run is refused; elsewhere
the user is told, with both numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from dstrain.engine.config import AdamConfig, FallingSchedule, ScheduleConfig
from dstrain.engine.schedule import learning_rate
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig

NEARLY = 0.98
"""Of a schedule's steps: a run that has so many is not told that it ends before the schedule."""


class TimedSettings(Protocol):
    """The sections of a recipe that count steps."""

    @property
    def optimizer(self) -> AdamConfig: ...  # noqa: D102
    @property
    def schedule(self) -> ScheduleConfig: ...  # noqa: D102
    @property
    def training(self) -> TrainingConfig: ...  # noqa: D102
    @property
    def validation(self) -> ValidationConfig: ...  # noqa: D102
    @property
    def checkpoint(self) -> CheckpointConfig: ...  # noqa: D102
    @property
    def reporting(self) -> ReportingConfig: ...  # noqa: D102


class Horizons:
    """A recipe's settings beside the length of its run. steps_per_epoch: None if no data is known yet.

    steps: the planned number, None if it is unknown; hours may end the run before.
    """

    def __init__(self, settings: TimedSettings, steps_per_epoch: int | None = None) -> None:
        self._settings = settings
        self.steps_per_epoch = steps_per_epoch
        training = settings.training
        limits = [] if training.max_steps is None else [(training.max_steps, f"training.max_steps = {training.max_steps}")]
        if training.max_epochs is not None and steps_per_epoch is not None:
            steps = training.max_epochs * steps_per_epoch
            limits.append((steps, f"training.max_epochs = {training.max_epochs} ({steps:,} steps)"))
        self.steps: int | None
        self.steps, self._limit = min(limits, default=(None, ""))

    def errors(self) -> Iterator[str]:
        """Why the run is refused."""
        schedule = self._settings.schedule
        if self.steps is None or not isinstance(schedule, FallingSchedule) or schedule.final > 0:
            return
        if self.steps > schedule.total_steps:
            yield (
                f"{self._limit} goes beyond schedule.total_steps = {schedule.total_steps}, where the learning rate has ended: "
                f"{self.steps - schedule.total_steps:,} steps would change nothing; raise total_steps to {self.steps}, or set "
                f"training.max_steps = {schedule.total_steps}"
            )

    def warnings(self) -> list[str]:
        """Settings that cannot have their effect within the run, and what happens instead; what could not be compared."""
        if self.steps is not None:
            steps = self.steps
            lines = [*self._schedule(steps), *self._average(steps), *self._intervals(steps)]
            return [f"{line} (the run has {steps:,} steps: {self._limit})" for line in lines]
        if self._settings.training.max_epochs is not None:
            return []  # known once the data is
        return [f"training.max_hours alone ends the run, so it is unknown at which step: {self._unknown()}"]

    def _unknown(self) -> str:
        schedule = self._settings.schedule
        if isinstance(schedule, FallingSchedule):
            return (
                f"from step {schedule.total_steps:,} (schedule.total_steps) on it would train at a learning rate of "
                f"{schedule.final:g}; set training.max_steps = {schedule.total_steps} beside it"
            )
        return "warm-up, moving average and intervals are not compared with it"

    def _schedule(self, steps: int) -> Iterator[str]:
        schedule, peak = self._settings.schedule, self._settings.optimizer.learning_rate
        last = learning_rate(schedule, peak, steps - 1)
        if schedule.warmup_steps >= steps:
            yield (
                f"schedule.warmup_steps = {schedule.warmup_steps}: the learning rate reaches {last:.3g}, never "
                f"optimizer.learning_rate = {peak:g}"
            )
        elif isinstance(schedule, FallingSchedule):
            total, final = schedule.total_steps, schedule.final
            if steps < NEARLY * total:
                yield f"schedule.total_steps = {total}: the learning rate ends at {last:.3g}, not at {final:g}"
            elif steps > total:
                yield f"schedule.total_steps = {total}: from there on the learning rate stays at {final:g}"

    def _average(self, steps: int) -> Iterator[str]:
        ema = self._settings.training.ema
        if ema is None:
            return
        updates, memory = steps - ema.start_step, round(1 / (1 - ema.decay))
        if updates <= 0:
            yield f"training.ema.start_step = {ema.start_step}: bundles hold the weights themselves, not an average"
        elif memory > updates:
            yield (
                f"training.ema.decay = {ema.decay:g} is a memory of {memory:,} steps: the decay does not rise beyond "
                f"{ema.decay_after(updates):.3g}"
            )

    def _intervals(self, steps: int) -> Iterator[str]:
        validation, checkpoint, reporting = self._settings.validation, self._settings.checkpoint, self._settings.reporting
        between = self._interval(validation)
        if between is not None and between > steps:
            yield f"validation.every = {_duration(validation)}: the one validation is that at the end"
        elif between is not None and validation.patience is not None and steps // between <= validation.patience:
            yield (
                f"validation.patience = {validation.patience}: there are {steps // between} validations, too few to stop training"
            )
        between = self._interval(checkpoint)
        if between is not None and between > steps:
            yield f"checkpoint.every = {_duration(checkpoint)}: the one checkpoint is that at the end"
        if reporting.log_every > steps:
            yield f"reporting.log_every = {reporting.log_every}: no step is reported before the end"

    def _interval(self, section: ValidationConfig | CheckpointConfig) -> int | None:
        """In steps; None if that is unknown."""
        if section.unit == "steps":
            return section.every
        return None if self.steps_per_epoch is None else section.every * self.steps_per_epoch


def _duration(section: ValidationConfig | CheckpointConfig) -> str:
    return f"{section.every} {section.unit.removesuffix('s') if section.every == 1 else section.unit}"
