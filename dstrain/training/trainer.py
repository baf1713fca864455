"""The training loop: take a step, then the work due between two steps.

Between steps, in this order: agree over all ranks on signals and time, report, validate, write bundles, write the checkpoint.
So a checkpoint means that everything due at its step is done, and a resumed run repeats nothing. Only a checkpoint that a
signal asked for comes before that work; `TrainingState.completed_step` remembers that, and the resumed run does it first. The
agreement costs one all-reduce of three numbers a step.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from dstrain.batch import Batch, Size
from dstrain.checkpoint.directories import MANIFEST_NAME
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.data.batching.loader import Steps
from dstrain.data.batching.plan import PlannedStep
from dstrain.engine.loss_totals import StepReport
from dstrain.errors import DstrainError, TrainingError
from dstrain.log import log_fields, logger
from dstrain.protocols import Ranks, Resumable
from dstrain.training.bundles import BundleStore
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig
from dstrain.training.failures import explained
from dstrain.training.limits import reason_to_stop, remaining_seconds
from dstrain.training.preemption import Request, StopSignals
from dstrain.training.reporting import Reporter
from dstrain.training.state import TrainingState, Window, load_state
from dstrain.training.watchdog import Watchdog

MAX_CONSECUTIVE_SKIPPED = 100
"""After so many skipped updates in a row the loss scale will not recover any more."""


StepSource = Callable[[int, int], Steps]
"""(epoch, step in the epoch) -> the steps from there on; epochs count from 1."""
Validate = Callable[[Callable[[], bool]], Mapping[str, Any] | None]
"""Scores of the present weights, the same on every rank; None if the argument, collective, stopped it early."""


class Engine(Resumable, Protocol):
    """An engine as the trainer sees it."""

    def train_step(self, batches: Sequence[Batch], size: Size) -> StepReport:
        """One optimizer step; size: of all ranks' batches together."""
        ...


@dataclass(frozen=True)
class Stop:
    """Why training ends here, and the exit code of the process."""

    reason: str
    exit_code: int


class Trainer:
    """Runs one training to its end, or to a signal. All ranks hold one and call `run`.

    header: fields of the `start` event: run_id, recipe (a plain mapping), version. changes: of the recipe since it began.
    """

    def __init__(
        self,
        *,
        training: TrainingConfig,
        validation: ValidationConfig,
        checkpoint: CheckpointConfig,
        reporting: ReportingConfig,
        ranks: Ranks,
        engine: Engine,
        steps: StepSource,
        validate: Validate,
        checkpoints: CheckpointManager,
        bundles: BundleStore,
        reporter: Reporter,
        signals: StopSignals,
        watchdog: Watchdog,
        header: Mapping[str, Any],
        changes: Sequence[str] = (),
    ) -> None:
        self.training = training
        self.validation = validation
        self.checkpoint = checkpoint
        self.reporting = reporting
        self.ranks = ranks
        self.engine = engine
        self.steps = steps
        self.validate = validate
        self.checkpoints = checkpoints
        self.bundles = bundles
        self.reporter = reporter
        self.signals = signals
        self.watchdog = watchdog
        self.header = header
        self.changes = changes
        self._origin = time.monotonic()
        self._saved_step = -1
        self._reached: int | None = None
        self._last: tuple[PlannedStep, StepReport] | None = None

    def run(self) -> int:
        """Resume or begin, and train. Returns 0 at a limit, 85 or 130 after a signal (see `preemption`).

        Raises TrainingError or CheckpointError; the last complete checkpoint then stays as it is.
        """
        with self.signals, self.watchdog:
            try:
                return self._run()
            except (DstrainError, OSError, RuntimeError) as error:
                reason = explained(error, self.checkpoints.latest)
                self._emit_failure(reason or error)
                if reason is None:
                    raise
                raise reason from error
            finally:
                self.reporter.close()

    def _run(self) -> int:
        state, stop = self._do_pending(self._resume())
        if stop is None:
            with closing(self.steps(state.epoch, state.step_in_epoch)) as steps:
                state, stop = self._loop(state, steps)
        self._emit_end(state, stop)
        return stop.exit_code

    def _loop(self, state: TrainingState, steps: Steps) -> tuple[TrainingState, Stop]:
        clock = _Clock()
        for planned, batches in steps:
            self.watchdog.beat(f"training step {state.step + 1}")
            report = self._step(state, planned, batches)
            state, stop = self._do_pending(self._record(state, planned, batches, report, clock))
            if stop is not None:
                return state, stop
            clock = _Clock()
        raise AssertionError("a source of steps never ends")

    def _step(self, state: TrainingState, planned: PlannedStep, batches: Sequence[Batch]) -> StepReport:
        """One optimizer step; a step that is not finite is reported with its position before it ends training."""
        try:
            report = self.engine.train_step(batches, planned.size)
            if not math.isfinite(report.loss) and not report.skipped:
                reason = f"the loss is {report.loss}; lower optimizer.learning_rate or set engine.clip_norm"
                raise TrainingError(reason, on_all_ranks=True)
        except TrainingError as error:
            self._emit_window(state)
            self._emit_failure(error, epoch=planned.epoch, index=planned.index, examples=planned.examples.tolist())
            latest = self.checkpoints.latest
            resume = (
                f"The last checkpoint is {latest}: start again to resume, and name what you change of the recipe, for example "
                "with --set optimizer.learning_rate=X --accept-changes optimizer.learning_rate"
                if latest
                else "There is no checkpoint yet: start again from the beginning, with any recipe"
            )
            raise TrainingError(
                f"step {state.step + 1} failed (epoch {planned.epoch}, step {planned.index} of it; the last line of events.jsonl "
                f"lists its examples): {error}. {resume}",
                on_all_ranks=error.on_all_ranks,
            ) from error
        return report

    def _emit_failure(self, error: BaseException, **position: Any) -> None:
        """The event of what ends training, once; a full disk may not even take that. position: of a step that failed."""
        step, self._reached = self._reached, None
        if step is not None:
            with suppress(DstrainError, OSError):
                self.reporter.emit("failure", step, message=str(error), **position)

    def _resume(self) -> TrainingState:
        """The state to go on from; the event file then holds what had happened until then, once."""
        self.watchdog.beat("loading the latest checkpoint")
        latest = self.checkpoints.load_latest(self.engine)
        self.bundles.recover()
        if latest is None:
            self.reporter.cut(0)
            self.reporter.emit("start", 0, world_size=self.ranks.size, **self.header)
            return TrainingState()
        state = load_state(latest.state, latest.directory / MANIFEST_NAME)
        self._origin = time.monotonic() - state.elapsed_seconds
        self._saved_step = state.step
        self.reporter.cut(state.events_bytes)
        layouts = {"layout": self.engine.layout, "layout_before": latest.layout}
        self.reporter.emit(
            "resume",
            state.step,
            path=str(latest.directory),
            world_size=self.ranks.size,
            changes=list(self.changes),
            **layouts,
        )
        if self.ranks.rank == 0:
            moved = [f"{latest.layout} -> {self.engine.layout}"] if latest.layout != self.engine.layout else []
            changes = "; ".join([*moved, *self.changes]) or "nothing changed"
            logger.info("resuming at step %d from %s: %s", state.step, latest.directory, changes)
        return self._judged(state)

    def _judged(self, state: TrainingState) -> TrainingState:
        """The state with its best score, if that is of the criterion that counts now."""
        name, criterion = "validation.metric: ", self.validation.criterion
        old = [line.removeprefix(name).split(" -> ")[0] for line in self.changes if line.startswith(name)]
        before = json.loads(old[0]) if old else criterion
        judged = state.judged_by(criterion, before)
        if judged is not state and self.ranks.rank == 0:
            logger.info("the best bundle is chosen anew, by %s", criterion)
        return judged

    def _record(
        self, state: TrainingState, planned: PlannedStep, batches: Sequence[Batch], report: StepReport, clock: _Clock
    ) -> TrainingState:
        """The state after one step."""
        state = state.after_step(planned, report, state.window.after(report, batches, *clock.seconds()))
        self._last = planned, report
        if state.consecutive_skipped >= MAX_CONSECUTIVE_SKIPPED:
            self._emit_window(state)
            raise TrainingError(
                f"{MAX_CONSECUTIVE_SKIPPED} updates in a row were skipped until step {state.step} (gradient norm "
                f"{report.grad_norm}): lower optimizer.learning_rate, set engine.clip_norm, or use engine.precision: bf16",
                on_all_ranks=True,
            )
        return state

    def _report(self, state: TrainingState, *, last: bool) -> TrainingState:
        """Show the step; emit a training event if one is due: at intervals, before a validation and at the end."""
        if state.step % self.reporting.log_every == 0 or self._validation_is_due(state) or last:
            return self._emit_window(state)
        self.reporter.step_done(state.step, remaining_seconds(self.training, state))
        return state

    def _emit_window(self, state: TrainingState) -> TrainingState:
        """The training event of the steps since the last one, if there are any; a new window begins."""
        if self._last is None or state.window.steps == 0:
            return state
        eta = remaining_seconds(self.training, state)
        self.reporter.emit("train", state.step, **_train_fields(state, *self._last, eta))
        return state.changed(window=Window())

    def _do_pending(self, state: TrainingState) -> tuple[TrainingState, Stop | None]:
        """Do the work due between two steps. Returns the state after it, and why training stops here, if it does."""
        self._reached = state.step
        state, request = self._agree(state)
        limit = reason_to_stop(self.training, self.validation, state)
        state = self._report(state, last=limit is not None)
        pending = state.completed_step < state.step
        if pending and request is None and (limit is not None or self._validation_is_due(state)):
            state, request = self._run_validation(state)
            limit = reason_to_stop(self.training, self.validation, state)
        if request is None:
            self._write_bundles(state, pending=pending, last=limit is not None)
        if request is None or not (limit or self._validation_is_due(state) or _is_due(self.checkpoint, state)):
            state = state.changed(completed_step=state.step)
        if request or limit or _is_due(self.checkpoint, state):
            self._save(state)
        if request is not None:
            return state, Stop(f"{request.name.lower()} by a signal", request.value)
        return state, Stop(limit, 0) if limit else None

    def _agree(self, state: TrainingState) -> tuple[TrainingState, Request | None]:
        """Signals of all ranks and the clock of rank 0, so that every rank decides alike."""
        elapsed = time.monotonic() - self._origin if self.ranks.rank == 0 else 0.0
        *flags, elapsed = self.ranks.all_reduce_sums([*self.signals.flags(), elapsed])
        return state.changed(elapsed_seconds=elapsed), self.signals.agreed(flags)

    def _validation_is_due(self, state: TrainingState) -> bool:
        if state.step == 0:
            return self.validation.run_sanity_validation
        return _is_due(self.validation, state)

    def _run_validation(self, state: TrainingState) -> tuple[TrainingState, Request | None]:
        """Validate and move the best score; a signal meanwhile leaves the state as it was.

        The sanity validation before the first step is reported but is no candidate for the best.
        """
        self.watchdog.beat(f"validation after step {state.step}")
        begin = time.perf_counter()
        scores = self.validate(lambda: self._agree(state)[1] is not None)
        if scores is None:
            return state, self._agree(state)[1]
        if state.step > 0:
            state = state.after_validation(scores[self.validation.score_name], self.validation.criterion)
        epoch = state.epoch - 1 if state.at_epoch_end else state.epoch
        seconds = time.perf_counter() - begin
        about = {"weights": "trained" if self.training.ema is None else "ema", "epoch": epoch, "seconds": seconds}
        best = {"best_score": state.best_score, "best_step": state.best_step}
        self.reporter.emit("valid", state.step, **about, **scores, **best)
        return state, None

    def _write_bundles(self, state: TrainingState, *, pending: bool, last: bool) -> None:
        names = []
        if pending and state.step > 0:
            names += [f"step_{state.step:08d}"] if _is_due(self.checkpoint, state) or last else []
            names += ["best"] if state.best_step == state.step else []
        names += ["last"] if last else []
        if names:
            self.watchdog.beat(f"writing bundles after step {state.step}")
            self.bundles.write(names, {"step": state.step, "num_targets": state.num_targets, "best_score": state.best_score})
            self.reporter.emit("bundle", state.step, names=names)

    def _save(self, state: TrainingState) -> None:
        if self._saved_step == state.step:
            return
        self.watchdog.beat(f"saving the checkpoint of step {state.step}")
        begin = time.perf_counter()
        state = state.changed(events_bytes=self.reporter.sync())
        path = self.checkpoints.save(state.step, self.engine, state.model_dump())
        self._saved_step = state.step
        self.reporter.emit("checkpoint", state.step, path=str(path), seconds=time.perf_counter() - begin)

    def _emit_end(self, state: TrainingState, stop: Stop) -> None:
        best = {"best_score": state.best_score, "best_step": state.best_step}
        self.reporter.emit(
            "end", state.step, reason=stop.reason, exit_code=stop.exit_code, elapsed_seconds=state.elapsed_seconds, **best
        )
        if self.ranks.rank == 0:
            took = timedelta(seconds=round(state.elapsed_seconds))
            logger.info("training ends after step %d: %s; %s in all", state.step, stop.reason, took)
            log_fields(self._next(state, stop))

    def _next(self, state: TrainingState, stop: Stop) -> dict[str, str]:
        """What there is now, and the commands that go on with it."""
        if stop.exit_code:
            return {"next": "the same command again goes on from here"}
        best, last = self.bundles.directory / "best", self.bundles.directory / "last"
        fields = {"last": str(last)}
        if state.best_score is not None:
            fields = {
                "best": f"{self.validation.score_name} {state.best_score:.4g} at step {state.best_step:,}: {best}",
                **fields,
            }
        model = last if state.best_score is None else best
        words = {"curves": ("report", self.bundles.directory.parent), "try it": ("interactive", model)}
        return fields | {name: shlex.join(["dstrain", verb, str(path)]) for name, (verb, path) in words.items()}


class _Clock:
    """Measures from when it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Wall time, and CPU time of all threads of this process."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def _is_due(config: ValidationConfig | CheckpointConfig, state: TrainingState) -> bool:
    """Whether something that happens every so many steps or epochs happens after the state's last step."""
    if config.unit == "steps":
        return state.step > 0 and state.step % config.every == 0
    return state.at_epoch_end and (state.epoch - 1) % config.every == 0


def _train_fields(state: TrainingState, planned: PlannedStep, report: StepReport, eta_seconds: float | None) -> dict[str, Any]:
    window = state.window
    loss = window.loss_sum / window.denominator if window.denominator else math.nan
    means = window.means()
    nll = means.pop("nll", math.nan)
    return {
        "epoch": planned.epoch,
        "steps": window.steps,
        "loss": loss,
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        **means,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "num_targets": window.num_targets,
        "tokens_per_second": window.num_targets / window.seconds,
        "seconds": window.seconds,
        "cpu_seconds": window.cpu_seconds,
        "padding": 1 - window.filled / window.positions if window.positions else None,
        "skipped": window.skipped,
        "eta_seconds": eta_seconds,
    }
